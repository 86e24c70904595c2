"""What the tests of gates share: small sketches and streams of scores."""

from __future__ import annotations

import numpy as np
import torch

SMALL = {"m": 64, "k": 8, "burn_in": 0, "reorth_every": 1, "k_topk": 0}


STREAMS = {
    "drift": lambda t, noise: 0.95 - 0.3 * t + 0.02 * (1 + t) * noise,
    "fall": lambda t, noise: 0.9 * np.exp(-20 * t) + 0.05 * noise**2,
    "jump": lambda t, noise: np.where(t > 0.5, 0.5, 0.9) + 0.02 * noise,
}


def stream(kind, length, seed):
    return STREAMS[kind](np.arange(length) / length, np.random.default_rng(seed).standard_normal(length))


def filled(gate, count, seed=0):
    for z in torch.randn(count, gate.m, generator=torch.Generator().manual_seed(seed)):
        gate.update(z)
    return gate
