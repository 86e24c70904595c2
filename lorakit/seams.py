"""Where a method may act on one batch: a page that tells the whole architecture.

    forward ── TokenSelection.select ── Gate.decide ── backward ── Controller.after_step ── step

`training/` runs that line and knows nothing but these classes. A **gate** looks at a batch's one forward pass and says
whether its backward is worth running; a **token selection** calls the model and says which tokens a backward reaches;
a **controller** acts between the steps: it prunes, skips layers, or follows a PEFT method's own schedule.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lorakit.errors import CheckpointError
from lorakit.head import IGNORED, shifted
from lorakit.settings import GateSettings


class Stateful(Protocol):
    """What has a part in a checkpoint: the attributes named in `kept`, or what a class makes of it.

    They may be plain values, tensors, random generators, what has a `state_dict` of its own, and dicts of these.
    """

    kept: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, readable with `torch.load(weights_only=True)`; resuming with it is bitwise."""
        return {name: _state(getattr(self, name)) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: keys are missing or unknown: it is another's.
        """
        check_state(state, self.kept, getattr(self, "name", type(self).__name__))
        for name in self.kept:
            setattr(self, name, _restored(getattr(self, name), state[name]))


def check_state(state: dict[str, Any], expected: Iterable[str], name: str) -> None:
    """Raise `CheckpointError` unless the keys of `state` are those `expected` of what is called `name`."""
    if {*state} != {*expected}:
        told = f"the checkpoint holds no state of {name!r} (it has {sorted(state) or 'none'})"
        why = "it was written without it, and starting it afresh would silently change the run"
        raise CheckpointError(f"{told}: {why}")


def _state(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _state(item) for name, item in value.items()}
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if hasattr(value, "state_dict") else value


def _restored(value: Any, state: Any) -> Any:
    """`value` as it was when `_state` of it was `state`."""
    if isinstance(value, dict):
        return {name: _restored(value.get(name), item) for name, item in state.items()}
    if isinstance(value, torch.Generator):
        return value.set_state(state)
    if hasattr(value, "load_state_dict"):
        value.load_state_dict(state)
        return value
    return state.to(getattr(value, "device", state.device)) if torch.is_tensor(state) else copy.copy(state)


class Seam(Stateful, Protocol):
    """What everything here can be asked for: its part of the record and of a checkpoint; nothing, where it has none."""

    def report(self) -> dict[str, Any]:
        """What the record is to know, as JSON values."""
        return {}


# which batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """What a gate may look at: the forward pass of one micro-batch, before its backward. Everything is detached.

    loss: () as it would be backpropagated, so that the losses of a window add up to the window's.
    logits: (B, T, V), or (B, C) for kind "classify"; labels: (B, T) or (B,), -100 where nothing is predicted.
    hidden: (B, T, H) or (B, H), what the head was given; only for gates that ask for it (`Gate.needs_hidden`).
    kind: "classify", "masked" (no shift) or "causal" (the logits at t predict the label at t + 1).
    softcap: c where the head's logits are c·tanh(logits / c).
    token_losses: (B·T,) or (B,), the negative log-likelihood at every position, where the loss function kept it.
    maxima: (B·T, …), the logits' `sketches.group_maxima`, where they were found with the losses.
    """

    loss: Tensor
    logits: Tensor | None
    labels: Tensor | None
    hidden: Tensor | None = None
    kind: str = "classify"
    softcap: float | None = None
    token_losses: Tensor | None = None
    maxima: Tensor | None = None

    @property
    def targets(self) -> int:
        """Labels the loss is made of."""
        return int((shifted(self.labels, self.kind) != IGNORED).sum())


@dataclass(frozen=True)
class Decision:
    """Run the backward pass or not, and the score that decided (None where the gate does not score)."""

    accept: bool
    score: float | None = None


class Gate(Seam):
    """Decides once per optimizer step, over its whole window of micro-batches; this one accepts everything.

    The trainer calls `measure` for every micro-batch, adds the results up over the window and over all ranks, and gives
    the sum to `decide`. A decision is thus about the batch the optimizer would step on, and the same on every rank.

    Attributes:
        name: key in tables; selective: False where every batch is accepted, in which case nothing is measured and
            gradients are computed as the plain Trainer computes them.
        candidates: rows looked at for each that is trained on, above 1 of `gates.BestRows` alone; of_examples: whether
            it scores only those, by their losses less the frozen base's; looks: whether it scores at all.
        needs_hidden: whether `measure` looks at `Candidate.hidden`; scores_novelty: whether the score is a novelty.
        target_rate, burn_in: the share of batches to accept, and how many at the start are accepted unseen.
    """

    name = "none"
    selective = needs_hidden = scores_novelty = of_examples = False
    candidates, looks = 1, True
    target_rate: float = 1.0
    burn_in: int = 0

    @classmethod
    def from_settings(cls, settings: GateSettings, model: torch.nn.Module, kind: str, seed: int) -> Self:
        """The gate of a run for `model`, whose task is "classify", "masked" or "causal"."""
        return cls()

    def measure(self, candidate: Candidate) -> Tensor:
        """What this micro-batch adds to the window's measurement, (n,) float64 with the same n every time."""
        return torch.zeros(0, dtype=torch.float64)

    def decide(self, measured: Tensor) -> Decision:
        """Accept or reject the window whose measurements add up to `measured` (n,)."""
        return Decision(accept=True)

    def acceptance_rate(self) -> float:
        """Share of batches accepted of late, burn-in left out."""
        return self.target_rate

    def flops(self, candidate: Candidate) -> float:
        """FLOPs of one `measure` and its part in `decide`, by formula."""
        return 0.0

    def report(self) -> dict[str, Any]:
        return {"name": self.name, "target_rate": self.target_rate, "burn_in": self.burn_in}


class AlwaysOpen(Gate):
    """The baseline: every batch gets its backward."""


GATES: dict[str, type[Gate]] = {"none": AlwaysOpen}  # gate -> its class; each module, and any user, enters its own


# which tokens ------------------------------------------------------------------------------------------

# (hidden (n, H), logits (n, V), labels (n,), losses (n,)) of some predictions, before any backward; and, where it has a
# true `grouped`, the logits' `sketches.group_maxima`, found while a processor's cache holds them
Look = Callable[..., None]
Inputs = Mapping[str, Any]  # of a model's forward, by name


@dataclass
class Selected:
    """What a selection made of one micro-batch.

    finish: the loss to backpropagate, () and summed over the chosen, weighted where they were sampled; what it runs,
        runs now, so that a rejected batch does not pay for it; to be called once, what was kept for it is given up.
    predictions: labels the batch has; chosen: those that were kept.
    loss_sum: Σ of the losses of *all* predictions, detached, where every one was scored; else None.
    backpropagated: input tokens a backward passes through; None: all of the batch's.
    made: what was made of their logits while all were looked at: "keep" them, "now" their gradient; empty: nothing.
    ran: R·K and R·K·T, where `finish` runs R rows of K tokens again; what its FLOPs and the backward's are made of.
    head: predictions whose gradient `finish` makes, and its chunks; the backward passes no head.
    flops: of scoring, by formula, beyond the matrix products that are counted as they run.
    """

    finish: Callable[[], Tensor]
    predictions: int
    chosen: int
    backpropagated: int | None
    made: str = ""
    ran: tuple[int, ...] = ()
    head: tuple[int, int] = (0, 0)
    loss_sum: Tensor | None = None
    flops: float = 0.0


class TokenSelection(Seam, Protocol):
    """Stands between the trainer and the model: calls the model, and says which tokens a backward reaches.

    selective: False where every token gets its backward.
    makes_loss: whether it makes the loss from what the head is given; else the trainer runs the model as ever, and
        asks nothing.
    two_pass: whether `Selected.finish` runs the model a second time.
    head: of the model (`lorakit.head.Head`); smoothing: of the labels.
    """

    smoothing: float
    selective: bool
    makes_loss: bool
    two_pass: bool
    head: Any

    def select(self, model: Callable[..., Any], inputs: Inputs, labels: Tensor, look: Look | None = None) -> Selected:
        """Run `model` on `inputs` (without labels) and choose; `look` sees every prediction, in chunks."""

    def verify(self, model: torch.nn.Module, inputs: Inputs, labels: Tensor) -> None:
        """Called once, before the first `select`: does the model do what the selection relies on?"""

    def divisor(self, labels: Tensor) -> int:
        """What the losses of a batch with these labels are divided by, to be summed over a window and all ranks."""

    def statistics(self, model: Callable[..., Any], inputs: Inputs, labels: Tensor) -> Tensor:
        """Of a batch in evaluation, (B, 4), see `training.loss.example_statistics`."""

    def sizes(self, labels: Tensor, look: Look | None = None) -> tuple[int, ...]:
        """What the FLOPs of `select` grow with, in proportion, beside those of a pass over the batch."""


class AllTokens(Seam):
    """The plain model: every token gets its backward, and the loss is made of all logits."""

    selective = makes_loss = two_pass = False


# between the steps -------------------------------------------------------------------------------------


class Controller(Seam):
    """Does nothing; a method overrides what it needs.

    The trainer calls `bind` and `begin` once, for every optimizer step `begin_step`, for a forward `begin_batch`,
    after `optimizer.step()` and before the gradients are cleared `after_step`, at every point of the curve `at_point`,
    and `end` when training is over. `share` is the share of the budget spent, 0 before the first step, at least 1 after
    the last; every rank has the same. `state_dict` goes into checkpoints: with it, resuming is bitwise.

    Attributes:
        name: key of `report()` in the record's `details`.
    """

    name = ""

    def bind(self, total_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Learn how to sum a float64 vector over all processes."""

    def bind_two_passes(self) -> None:
        """Learn that only chosen tokens get a backward, in a second pass; refuse what measures a whole batch's."""

    def begin(self) -> None:
        """Training starts, or goes on after a resume."""

    def begin_step(self, share: float) -> None:
        """An optimizer step's first forward comes next."""

    def begin_batch(self, inputs: Inputs) -> None:
        """A forward of these inputs comes next, labels among them; not called for evaluation."""

    def after_step(self, share: float, optimizer: torch.optim.Optimizer) -> None:
        """The weights have been updated; gradients are still there."""

    def at_point(self, step: int) -> None:
        """A point was added to the curve at optimizer step `step`."""

    def end(self) -> None:
        """Training is over, for whatever reason; the model is to be left ready for inference. May be called twice."""

    def signature(self) -> Hashable:
        """What, beside the batch's shape, the FLOPs of the coming pass depend on; plain numbers and tuples of them."""
        return ()
