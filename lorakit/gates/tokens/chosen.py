"""What a selection keeps of a batch's predictions, and what a dry run is told to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakit.gates.tokens.best import BestLogits


@dataclass
class Chosen:
    """What was kept of a batch's predictions.

    where: (k,) places in the flattened (B·T), ascending; targets: (k,) what is predicted there.
    predictions: N, of which these were chosen.
    weights: (k,) float32, 1 / π, or None for plain sums.
    loss_sum, chosen_sum: Σ of all losses and the (weighted) sum of the chosen, detached, where they were scored.
    best: their logits, where those were kept.
    """

    where: Tensor
    targets: Tensor
    predictions: int
    weights: Tensor | None = None
    loss_sum: Tensor | None = None
    chosen_sum: Tensor | None = None
    best: BestLogits | None = None

    def total(self, losses: Tensor) -> Tensor:
        """Σ of losses (k,), weighted where they were sampled."""
        return losses.sum() if self.weights is None else (losses * self.weights).sum()


@dataclass
class Plan:
    """What a dry run is to choose. where, targets: (N,) of all predictions; masks, places: of mode "fractional"."""

    where: Tensor
    targets: Tensor
    chosen: Chosen
    masks: Any = None
    places: Any = None
