"""A gate looks at a batch's one forward pass and says whether its backward is worth running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Candidate:
    """What a gate may look at: the forward pass of one micro-batch, before its backward.

    loss: () as it would be backpropagated; logits: (B, T, V) or (B, C); labels: (B, T) or (B,). All detached.
    """

    loss: torch.Tensor
    logits: torch.Tensor | None
    labels: torch.Tensor | None


@dataclass(frozen=True)
class Decision:
    """Run the backward pass or not, and the score that decided (None where the gate does not score)."""

    accept: bool
    score: float | None = None


class Gate(Protocol):
    """Decides once per micro-batch; its state goes into every checkpoint and comes back on resume."""

    def decide(self, candidate: Candidate) -> Decision: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AlwaysOpen:
    """The baseline: every batch gets its backward."""

    def decide(self, candidate: Candidate) -> Decision:
        return Decision(accept=True)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the gate has no state."""
