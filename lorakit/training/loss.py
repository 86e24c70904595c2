"""One loss for every model: the mean over all labels of an optimizer step, however many batches it was split into."""

from typing import Any

import torch
import torch.nn.functional as F

from lorakit.head import IGNORED, shifted


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
        labels = shifted(labels, self.kind)  # shifting labels, not logits, copies no logits
        losses = F.cross_entropy(outputs.logits.flatten(0, -2).float(), labels.flatten(), reduction="none")
        self.token_losses = losses.detach()
        count = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum()
        # nothing to predict: trained on as 0; evaluated as NaN, which the Trainer leaves out of its mean
        return losses.sum() / max(count, int(torch.is_grad_enabled()))


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
    rows = []
    for sequence, predicted in zip(logits, shifted(labels, kind), strict=True):  # (T, V) and (T,)
        valid = predicted != IGNORED
        chosen, targets = sequence[valid].float(), predicted[valid]  # only the positions that have a label are read
        loss, right = F.cross_entropy(chosen, targets, reduction="sum"), (chosen.argmax(-1) == targets).sum()
        rows.append(torch.stack([loss.double(), valid.sum().double(), right.double(), valid.sum().double()]))
    return torch.stack(rows)
