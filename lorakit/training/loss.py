"""One loss for every model: the mean over all labels of an optimizer step, however many batches it was split into."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class MeanLoss:
    """A `compute_loss_func` for the Trainer.

    transformers' own classification losses ignore `num_items_in_batch` while the Trainer believes they use it, so their
    gradients grow with the number of accumulated batches (transformers 5.23, BERT). This one divides by it.

    Args:
        kind: "classify": logits (B, C), labels (B,); "masked" and "causal": logits (B, T, V), labels (B, T) with -100
            where nothing is predicted; "causal" pairs the logits at t with the label at t + 1.

    Attributes:
        token_losses: of the last call, the negative log-likelihood at every position, (B,) or (B·T,), 0 where nothing
            is predicted; detached. With it a gate need not normalise 262k logits a second time.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.token_losses: torch.Tensor | None = None

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.kind == "causal":
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]  # shifting labels, not logits, copies no logits
        losses = F.cross_entropy(outputs.logits.flatten(0, -2).float(), labels.flatten(), reduction="none")
        self.token_losses = losses.detach()
        count = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        return losses.sum() / max(count, 1)  # nothing to predict: 0, not NaN
