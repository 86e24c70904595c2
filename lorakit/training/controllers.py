"""What acts between the steps of a run beside the gate: pruning, skipping, a PEFT method's own schedule."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Controller:
    """Does nothing; a method overrides what it needs.

    The trainer calls `bind` and `begin` once, for every optimizer step `begin_step`, then after `optimizer.step()` and
    before the gradients are cleared `after_step`, at every point of the curve `at_point`, and `end` when training is
    over. `share` is the share of the budget spent, 0 before the first step, at least 1 after the last; every rank has
    the same. `state_dict` goes into checkpoints: with it, resuming is bitwise.

    Attributes:
        name: key of `report()` in the record's `details`.
    """

    name = ""

    def bind(self, total_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Learn how to sum a float64 vector over all processes."""

    def begin(self) -> None:
        """Training starts, or goes on after a resume."""

    def begin_step(self, share: float) -> None:
        """An optimizer step's first forward comes next."""

    def after_step(self, share: float, optimizer: torch.optim.Optimizer) -> None:
        """The weights have been updated; gradients are still there."""

    def at_point(self, step: int) -> None:
        """A point was added to the curve at optimizer step `step`."""

    def end(self) -> None:
        """Training is over, for whatever reason; the model is to be left ready for inference. May be called twice."""

    def signature(self) -> Hashable:
        """What, beside the batch's shape, the FLOPs of the coming pass depend on; plain numbers and tuples of them."""
        return ()

    def report(self) -> dict[str, Any]:
        """What the record is to know, as JSON values."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, readable with `torch.load(weights_only=True)`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
