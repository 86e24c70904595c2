"""Which of a batch's predictions are kept: a share of the whole batch's, or of each sequence's."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from lorakit.gates.tokens import policies
from lorakit.gating import Gating
from lorakit.sketches.head_gradient import rows


class Shares:
    """Picks from scores, as settings say.

    Args:
        settings: what to choose and how; kind: "causal" or "masked".
        seed: of the draws; rank: of this process, whose draws are its own.
    """

    def __init__(self, settings: Gating, kind: str, *, seed: int = 0, rank: int = 0):
        self.settings, self.kind, self.seed, self.rank = settings, kind, seed, rank
        self.draws = 0

    def predictions(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the flattened (B·T) predictions are made, and what is predicted there; (N,) each."""
        return rows(labels, self.kind)

    def counts(self, labels: Tensor) -> list[int]:
        """Predictions of each sequence."""
        shifted = labels[:, 1:] if self.kind == "causal" else labels
        return (shifted != -100).sum(1).tolist()

    def groups(self, labels: Tensor) -> list[int]:
        """Predictions of each group that has a share of its own: of the batch, or of its sequences."""
        counts = self.counts(labels)
        return [sum(counts)] if self.settings.per == "batch" else counts

    def quotas(self, groups: Sequence[int]) -> list[int]:
        """How many of each group are kept."""
        return [policies.quota(count, self.settings.topk_tokens) for count in groups]

    def generator(self) -> Generator:
        """The next batch's, from (seed, rank, how many there were), so that a checkpoint of one rank serves all."""
        drawn = random.Random(f"{self.seed}/{self.rank}/{self.draws}").getrandbits(63)
        self.draws += 1
        return Generator().manual_seed(drawn)

    def pick(self, scores: Tensor | None, groups: Sequence[int], generator: Generator) -> tuple[Tensor, Tensor | None]:
        """Places (k,) among the batch's predictions, whose scores (N,) are given; and weights of sampled ones."""
        places, weights, first = [], [], 0
        for count, k in zip(groups, self.quotas(groups), strict=True):
            if k:
                mine = None if scores is None else scores[first : first + count]
                index, weight = self._pick(mine, count, k, generator)
                places.append(first + index)
                weights.append(weight)
            first += count
        index = torch.cat(places) if places else torch.zeros(0, dtype=torch.long)
        return index, torch.cat(weights) if places and self.settings.weighted else None

    def _pick(self, scores: Tensor | None, count: int, k: int, generator: Generator) -> tuple[Tensor, Tensor | None]:
        if self.settings.method == "random":
            return policies.uniform(count, k, generator), None
        if not self.settings.weighted:
            return policies.largest(scores, k), None
        index, probabilities = policies.proportional(scores, k, generator)
        return index, (1 / probabilities).float()
