"""One loss for every model: the mean over all labels of an optimizer step, however many batches it was split into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def mean_loss(kind: str) -> Callable[..., torch.Tensor]:
    """A `compute_loss_func` for the Trainer.

    transformers' own classification losses ignore `num_items_in_batch` while the Trainer believes they use it, so their
    gradients grow with the number of accumulated batches (transformers 5.23, BERT). This one divides by it.

    Args:
        kind: "classify": logits (B, C), labels (B,); "masked" and "causal": logits (B, T, V), labels (B, T) with -100
            where nothing is predicted; "causal" pairs the logits at t with the label at t + 1.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        logits = outputs.logits
        if kind == "causal":
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]  # shifting labels, not logits, copies no logits
        total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
        count = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        return total / max(count, 1)  # nothing to predict: 0, not NaN

    return loss
