"""What stands between the trainer and the model, and says which tokens of a batch get a backward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# (hidden (n, H), logits (n, V), labels (n,), losses (n,)) of some predictions, before any backward
Look = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass
class Selected:
    """What a selection made of one micro-batch.

    finish: the loss to backpropagate, () and summed over the chosen, weighted where they were sampled; what it runs,
        runs now, so that a rejected batch does not pay for it; to be called once, what was kept for it is given up.
    predictions: labels the batch has; chosen: those that were kept.
    loss_sum: Σ of the losses of *all* predictions, detached, where every one was scored; else None.
    chosen_sum: as `finish()` will give it, detached, where known.
    backpropagated: input tokens a backward passes through; None: all of the batch's.
    key: what the FLOPs of `finish` and of the backward depend on, beside the batch's shape.
    flops: of scoring, by formula, beyond the matrix products that are counted as they run.
    """

    finish: Callable[[], Tensor]
    predictions: int
    chosen: int
    backpropagated: int | None
    key: Hashable
    loss_sum: Tensor | None = None
    chosen_sum: Tensor | None = None
    flops: float = 0.0


class TokenSelection(Protocol):
    """Stands between the trainer and the model: calls the model, and says which tokens a backward reaches.

    selective: False where every token gets its backward: then the trainer runs the model as ever, and asks nothing.
    two_pass: whether `Selected.finish` runs the model a second time.
    head: of the model (`gates.head.Head`).
    """

    selective: bool
    two_pass: bool
    head: Any

    def select(
        self, model: Callable[..., Any], inputs: Mapping[str, Any], labels: Tensor, look: Look | None = None
    ) -> Selected:
        """Run `model` on `inputs` (without labels) and choose; `look` sees every prediction, in chunks."""

    def verify(self, model: torch.nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> None:
        """Called once, before the first `select`: does the model do what the selection relies on?"""

    def divisor(self, labels: Tensor) -> int:
        """What the losses of a batch with these labels are divided by, to be summed over a window and all ranks."""

    def signature(self, labels: Tensor) -> Hashable:
        """What, beside the batch's shape, the FLOPs of `select` depend on."""

    def report(self) -> dict[str, Any]:
        """What the record is to know."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AllTokens:
    """The baseline: every token gets its backward."""

    selective = two_pass = False

    def report(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the selection has no state."""


def count_tokens(inputs: Mapping[str, torch.Tensor], pad_token_id: int | None) -> int:
    """Non-padding input tokens of a batch: from a (B, T) attention mask, else by the padding id (packed rows)."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.sum())
    ids = inputs["input_ids"]
    return ids.numel() if pad_token_id is None else int((ids != pad_token_id).sum())
