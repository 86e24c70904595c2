"""What the tests of sketches, gates and token scores share: small sketches, explicit ones, streams of scores."""

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


def explicit_sketch(sketch, gradient):
    """CountSketch of a gradient (V, H) as a vector, with the tensor sketch's hashes and signs, entry by entry."""
    buckets = (sketch.x.buckets[None] + sketch.y.buckets[:, None]) % sketch.size
    signed = (sketch.x.signs[None] * sketch.y.signs[:, None] * gradient).double()
    return torch.zeros(sketch.size, dtype=torch.float64).scatter_add_(0, buckets.flatten(), signed.flatten())


def pairs(labels, kind):
    """(place of the hidden state, label predicted there), written as one says it."""
    if kind == "classify":
        return [((b,), int(y)) for b, y in enumerate(labels) if y != -100]
    shift, (rows, length) = int(kind == "causal"), labels.shape
    places = [(b, t) for b in range(rows) for t in range(length - shift)]
    return [((b, t), int(labels[b, t + shift])) for b, t in places if labels[b, t + shift] != -100]
