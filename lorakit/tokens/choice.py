"""Scores -> which predictions are kept: the k largest, k uniformly, or k with probability proportional to size.

The share is of the whole batch's predictions, or of each sequence's.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lorakit.head import IGNORED, shifted
from lorakit.settings import Gating
from lorakit.tokens.kept_logits import Held

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
        probabilities = torch.where(certain, 1.0, (k - int(certain.sum())) * sizes / sizes[~certain].sum())
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
    passed = torch.ceil(ends - torch.rand((), generator=generator, dtype=torch.float64))
    places = order[passed.diff(prepend=passed.new_zeros(1)) > 0].sort().values
    return places, probabilities[places]


# of a batch --------------------------------------------------------------------------------------------


@dataclass
class Shares:
    """Picks from scores, as settings say.

    Args:
        settings: what to choose and how; kind: "causal" or "masked".
        seed: of the draws; rank: of this process, whose draws are its own.
        draws: batches there were.
    """

    settings: Gating
    kind: str
    seed: int = 0
    rank: int = 0
    draws: int = 0

    def groups(self, labels: Tensor) -> list[int]:
        """Predictions of each group that has a share of its own: of the batch, or of its sequences."""
        counts = (shifted(labels, self.kind) != IGNORED).sum(1).tolist()
        return [sum(counts)] if self.settings.per == "batch" else counts

    def quotas(self, groups: Sequence[int]) -> list[int]:
        """How many of each group are kept."""
        return [quota(count, self.settings.topk_tokens) if self.settings.selective else count for count in groups]

    def generator(self) -> Generator:
        """The next batch's, from (seed, rank, how many there were), so that a checkpoint of one rank serves all."""
        drawn = random.Random(f"{self.seed}/{self.rank}/{self.draws}").getrandbits(63)
        self.draws += 1
        return Generator().manual_seed(drawn)

    def pick(self, scores: Tensor | None, groups: Sequence[int], generator: Generator) -> tuple[Tensor, Tensor | None]:
        """Places (k,) among the batch's predictions, whose scores (N,) are given; and weights of sampled ones."""
        places, weights, first = [torch.zeros(0, dtype=torch.long)], [], 0
        for count, k in zip(groups, self.quotas(groups), strict=True):
            mine = None if scores is None else scores[first : first + count]
            if k == count and not (k and self.settings.weighted):
                index = torch.arange(count)
            elif self.settings.method == "random":
                index = uniform(count, k, generator)
            elif self.settings.weighted:
                index, probabilities = proportional(mine, k, generator)
                weights.append((1 / probabilities).float())
            else:
                index = largest(mine, k)
            places.append(first + index)
            first += count
        return torch.cat(places), torch.cat(weights) if weights else None


@dataclass
class Chosen:
    """What was kept of a batch's predictions.

    where: (k,) places in the flattened (B·T), ascending; targets: (k,) what is predicted there.
    predictions: N, of which these were chosen.
    index: (k,) which of these they are.
    weights: (k,) float32, 1 / π, or None for plain sums.
    loss_sum: Σ of all losses, detached, where they were scored.
    held: what was kept of their logits while those were looked at.
    """

    where: Tensor
    targets: Tensor
    predictions: int
    index: Tensor
    weights: Tensor | None = None
    loss_sum: Tensor | None = None
    held: Held | None = None


@dataclass
class Plan:
    """What a dry run is to choose. where, targets: (N,) of all predictions; masks, places: of mode "fractional"."""

    where: Tensor
    targets: Tensor
    chosen: Chosen
    masks: Any = ()
    places: Any = None
