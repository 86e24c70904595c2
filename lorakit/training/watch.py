"""Ends a run that trains nothing, and warns where accepted batches leave the adapters without a gradient."""

from __future__ import annotations

import torch

from lorakit.gates.log import GateLog
from lorakit.modules import adapter_parameters

STALLED = 2000  # batches in a row without a backward after which the run is ended
GRADIENTS_BY = 3  # accepted batches after which an adapter must have had a gradient


class Diverged(Exception):
    """The loss is not a finite number any more, or no batch is accepted any more; the message says where."""


class Watch:
    """Looks at `model` after every window; warnings go to `log`."""

    def __init__(self, model: torch.nn.Module, log: GateLog):
        self.log, self.adapted = log, adapter_parameters(model)
        self.without_backward = self.without_gradient = 0

    def window(self, trained: bool) -> None:
        """A window got its backward, or was rejected or without labels.

        Raises:
            Diverged: `STALLED` of them in a row got none.
        """
        self.without_backward = 0 if trained else self.without_backward + 1
        if self.without_backward >= STALLED:
            raise Diverged(f"{STALLED} batches in a row had no label or were rejected (gate {self.log.gate.name!r})")

    def gradients(self) -> None:
        """A window was accepted and its gradients are there: until one has reached an adapter, look for it."""
        if any(p.grad is not None and bool(p.grad.any()) for p in self.adapted):
            self.adapted = []  # they get one: never look again
        if not self.adapted:
            return
        self.without_gradient += 1
        if self.without_gradient == GRADIENTS_BY:
            self.log.warn(
                f"no gradient reached an adapter in the first {GRADIENTS_BY} accepted batches: is it attached to "
                "layers that take part in the forward, and does it require gradients?"
            )
