"""A gate looks at a batch's one forward pass and says whether its backward is worth running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Candidate:
    """What a gate may look at: the forward pass of one micro-batch, before its backward. Everything is detached.

    loss: () as it would be backpropagated, so that the losses of a window add up to the window's.
    logits: (B, T, V), or (B, C) for kind "classify"; labels: (B, T) or (B,), -100 where nothing is predicted.
    hidden: (B, T, H) or (B, H), what the head was given; only for gates that ask for it (`Gate.needs_hidden`).
    kind: "classify", "masked" (no shift) or "causal" (the logits at t predict the label at t + 1).
    softcap: c where the head's logits are c·tanh(logits / c).
    token_losses: (B·T,) or (B,), the negative log-likelihood at every position, where the loss function kept it.
    """

    loss: torch.Tensor
    logits: torch.Tensor | None
    labels: torch.Tensor | None
    hidden: torch.Tensor | None = None
    kind: str = "classify"
    softcap: float | None = None
    token_losses: torch.Tensor | None = None

    @property
    def targets(self) -> int:
        """Labels the loss is made of."""
        labels = self.labels[..., 1:] if self.kind == "causal" else self.labels
        return int((labels != -100).sum())


@dataclass(frozen=True)
class Decision:
    """Run the backward pass or not, and the score that decided (None where the gate does not score)."""

    accept: bool
    score: float | None = None


class Gate:
    """Decides once per optimizer step, over its whole window of micro-batches; this one accepts everything.

    The trainer calls `measure` for every micro-batch, adds the results up over the window and over all ranks, and gives
    the sum to `decide`. A decision is thus about the batch the optimizer would step on, and the same on every rank.

    Attributes:
        name: key in tables; selective: False where every batch is accepted, in which case nothing is measured and
            gradients are computed as the plain Trainer computes them.
        needs_hidden: whether `measure` looks at `Candidate.hidden`.
        target_rate, burn_in: the share of batches to accept, and how many at the start are accepted unseen.
    """

    name = "none"
    selective = False
    needs_hidden = False
    target_rate: float = 1.0
    burn_in: int = 0

    def measure(self, candidate: Candidate) -> torch.Tensor:
        """What this micro-batch adds to the window's measurement, (n,) float64 with the same n every time."""
        return torch.zeros(0, dtype=torch.float64)

    def decide(self, measured: torch.Tensor) -> Decision:
        """Accept or reject the window whose measurements add up to `measured` (n,)."""
        return Decision(accept=True)

    def acceptance_rate(self) -> float:
        """Share of batches accepted of late, burn-in left out."""
        return 1.0

    def flops(self, candidate: Candidate) -> float:
        """FLOPs of one `measure` and its part in `decide`, by formula."""
        return 0.0

    def report(self) -> dict[str, Any]:
        """What the record is to know of this gate."""
        return {"name": self.name, "target_rate": self.target_rate, "burn_in": self.burn_in}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, readable with `torch.load(weights_only=True)`; resuming with it is bitwise."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class AlwaysOpen(Gate):
    """The baseline: every batch gets its backward."""
