"""Scores -> which predictions are kept: the k largest, k uniformly, or k with probability proportional to size."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

FLOOR = 0.05  # of the mean score, added to all: a prediction of score 0 must have a chance for weights to exist


def quota(count: int, share: float) -> int:
    """k: `share` of `count` predictions, rounded; at least 1 of any."""
    return min(count, max(1, math.floor(share * count + 0.5))) if count else 0


def largest(scores: Tensor, k: int) -> Tensor:
    """Places (k,), ascending, of the k largest of `scores` (N,)."""
    return scores.topk(k).indices.sort().values


def uniform(count: int, k: int, generator: Generator) -> Tensor:
    """k of `count` places without replacement, ascending."""
    return torch.randperm(count, generator=generator)[:k].sort().values


def inclusion_probabilities(sizes: Tensor, k: int) -> Tensor:
    """π (N,) float64, proportional to `sizes` (N,) ≥ 0 but at most 1, Σπ = k; `FLOOR` of the mean is added to each.

    Those whose share would be above 1 are certain, and the rest share what is left (Särndal, Swensson and Wretman
    1992, 3.6.2).
    """
    sizes = sizes.double()
    mean = sizes.mean()
    sizes = sizes + FLOOR * mean if mean > 0 else torch.ones_like(sizes)
    if k >= len(sizes):
        return torch.ones_like(sizes)
    certain = torch.zeros(len(sizes), dtype=torch.bool)
    while True:
        left = k - int(certain.sum())
        probabilities = torch.where(certain, 1.0, left * sizes / sizes[~certain].sum())
        above = ~certain & (probabilities >= 1)
        if not bool(above.any()):
            return probabilities
        certain |= above


def proportional(sizes: Tensor, k: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Exactly k places, ascending, drawn with the probabilities π above, and their π, (k,) each.

    Systematic sampling in a random order: one uniform number u, and whoever spans a point u, u + 1, … of the running
    sum of π is drawn, so that P(drawn) = π exactly.
    """
    probabilities = inclusion_probabilities(sizes, k)
    order = torch.randperm(len(sizes), generator=generator)
    ends = probabilities[order].cumsum(0).clamp(max=k)
    ends[-1] = k
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    passed = torch.ceil(ends - offset)
    drawn = passed.diff(prepend=torch.zeros(1, dtype=torch.float64)) > 0
    places = order[drawn].sort().values
    return places, probabilities[places]
