"""One loss for every model: the mean over all labels of an optimizer step, however many batches it was split into."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from lorakit.errors import require
from lorakit.head import IGNORED, by_sequence, fullest_row, rows, same_loss, shifted, takes_labels
from lorakit.modules import evaluating, require_own_names, set_until
from lorakit.sketches.head_gradient import chunk_of


class MeanLoss:
    """A `compute_loss_func` for the Trainer.

    transformers' own classification losses ignore `num_items_in_batch` while the Trainer believes they use it, so their
    gradients grow with the number of accumulated batches (transformers 5.23, BERT). This one divides by it.

    Args:
        kind: "classify": logits (B, C), labels (B,); "masked" and "causal": logits (B, T, V), labels (B, T) with -100
            where nothing is predicted; "causal" pairs the logits at t with the label at t + 1.
        smoothing: `label_smoothing_factor`, in [0, 1).

    Attributes:
        token_losses: of the last call, the negative log-likelihood at every position, (B,) or (B·T,), 0 where nothing
            is predicted; detached; None where smoothed. With it a gate need not normalise 262k logits a second time.
    """

    def __init__(self, kind: str, smoothing: float = 0.0):
        self.kind, self.smoothing = kind, smoothing
        self.token_losses: Tensor | None = None

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        labels = shifted(labels, self.kind)  # shifting labels, not logits, copies no logits
        logits, smoothing = outputs.logits.flatten(0, -2).float(), self.smoothing
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=smoothing)
        self.token_losses = None if smoothing else losses.detach()
        count = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum()
        # nothing to predict: trained on as 0; evaluated as NaN, which the Trainer leaves out of its mean
        return losses.sum() / max(count, int(torch.is_grad_enabled()))


class OwnLoss:
    """A `compute_loss_func`: the mean loss that the model itself computes, of a batch that weighs as many labels as it
    has. shifts: whether the first label of a sequence is none, as the Trainer counts them.
    """

    def __init__(self, shifts: bool):
        self.shifts = shifts

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if num_items_in_batch is None:
            return outputs.loss
        count = (labels[..., 1:] if self.shifts else labels).ne(IGNORED).sum()
        if count == 0 and torch.is_grad_enabled():
            return outputs.logits.float().sum() * 0.0  # its own is NaN
        return outputs.loss * (count / num_items_in_batch)


def has_labels(labels: Tensor | None) -> bool:
    """Whether there is one that is not -100."""
    return labels is not None and bool(labels.ne(IGNORED).any())


@torch.no_grad()
def is_mean_loss(model: torch.nn.Module, inputs: Mapping[str, Any], kind: str) -> bool:
    """Whether the loss of `model` itself, on the row with most labels, is `MeanLoss(kind)`: no regression, no several
    labels at once, no loss function of its own, nothing added to it. A model that has no loss is taken at its word.
    """
    labels = inputs["labels"]
    if not takes_labels(model):
        return True
    if labels.is_floating_point() or getattr(model.config, "num_labels", None) == 1 and kind == "classify":
        return False
    single, _ = fullest_row(inputs, labels, kind)
    with evaluating(model):
        outputs = model(**single)
    return outputs.loss is None or same_loss(outputs.loss, MeanLoss(kind)(outputs, single["labels"]))


class LossTrainer(Trainer):
    """A Trainer with the loss that was asked for: an overridden `compute_loss` or a `compute_loss_func`; else, where
    the kind of the model is known, `MeanLoss`, or the model's own where that is another one; else the Trainer's.

    Args:
        kind: "classify", "masked", "causal", or empty.
        tokenizer: what `processing_class` is called in older scripts.
    """

    def __init__(self, kind: str, *, tokenizer: Any = None, **trainer_arguments: Any):
        if tokenizer is not None:
            told = "is called processing_class: give one of them"
            require(trainer_arguments.get("processing_class") is None, "tokenizer", type(tokenizer).__name__, told)
            trainer_arguments["processing_class"] = tokenizer
        model = trainer_arguments["model"]
        if attached := hasattr(model, "lorakit_attachment"):
            require_own_names(model)
        with contextlib.ExitStack() as stack:
            # the Trainer refuses what transformers packed unless it has adapters; and who trains its head: see `attach`
            if attached and getattr(model, "is_quantized", False):
                set_until(stack, model, _hf_peft_config_loaded=True)
            super().__init__(**trainer_arguments)
        self.kind = kind
        self.overridden = type(self).compute_loss is not LossTrainer.compute_loss
        self._loss_found = self.compute_loss_func is not None  # whether the model's own is to be asked no more
        if kind and not self.overridden and self.compute_loss_func is None:
            smoothing = self.label_smoother.epsilon if self.label_smoother else 0.0
            self.compute_loss_func, self._loss_found = MeanLoss(kind, smoothing), smoothing > 0

    def require_no_other_loss(self, why: str, smoothing: float) -> None:
        """Refuse for `why` any loss that the user asked for, but this `smoothing`; the model's own waits."""
        own, smoothed = self.compute_loss_func, self.args.label_smoothing_factor
        require(not self.overridden, "compute_loss", type(self).__name__, why)
        require(own is None or type(own) is MeanLoss, "compute_loss_func", own, why)
        require(smoothed == smoothing, "label_smoothing_factor", smoothed, why)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Trainer's: of `MeanLoss`, or where the model's own is another, of that; the user's where there is one."""
        self._find_loss(inputs)
        if isinstance(self.compute_loss_func, OwnLoss):
            forward, labels = model, inputs["labels"]
            model = lambda num_items_in_batch=None, **given: forward(labels=labels, **given)  # noqa: E731
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _find_loss(self, inputs) -> None:
        """With the first labels: whether the model's own loss is to be taken."""
        if self.kind and not self.overridden and not self._loss_found and has_labels(inputs.get("labels")):
            self._loss_found = True
            if not is_mean_loss(self.model, inputs, self.kind):
                self.compute_loss_func = OwnLoss(self._loss_shifts_labels)


def example_statistics(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
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
    where, targets = rows(labels, kind)
    flat, size = logits.flatten(0, -2), chunk_of(logits.shape[-1])
    chunks = ((flat[at].float(), words) for at, words in zip(where.split(size), targets.split(size), strict=True))
    parts = ((F.cross_entropy(z, y, reduction="none"), z.argmax(-1) == y) for z, y in chunks)
    return by_sequence(parts, where, labels.shape)
