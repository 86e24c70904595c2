"""Evaluation statistics per example: (summed loss, valid labels, prediction, label), enough for every metric."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def example_statistics(logits: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    """Statistics of one batch, (B, 4) float64.

    Args:
        logits: (B, C) for kind "classify"; (B, T, V) for "masked" and "causal".
        labels: (B,) classes, or (B, T) token ids with -100 where there is nothing to predict.
        kind: "causal" pairs the logits at t with the label at t + 1.

    Columns: summed negative log-likelihood in nats; number of valid labels; predicted class (language models: number of
    tokens predicted right); true class (language models: number of valid labels).
    """
    if kind == "classify":
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        return torch.stack([loss, torch.ones_like(loss), logits.argmax(-1), labels], dim=1).double()
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.stack([_sequence_statistics(*row) for row in zip(logits, labels, strict=True)])


def _sequence_statistics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Statistics (4,) of one sequence, logits (T, V) and labels (T,), reading only the positions that have a label."""
    valid = labels != -100
    chosen, targets = logits[valid].float(), labels[valid]
    loss = F.cross_entropy(chosen, targets, reduction="sum").double()
    count = valid.sum().double()
    right = (chosen.argmax(-1) == targets).sum().double()
    return torch.stack([loss, count, right, count])
