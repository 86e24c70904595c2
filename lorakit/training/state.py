"""What a run has come to: what a checkpoint saves and a callback moves; its curve, one point per log."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorakit.gates.log import GateLog
from lorakit.records import Point
from lorakit.seams import Controller, Gate, TokenSelection
from lorakit.training.costs import SPENT, FlopMeter, Ledger


@dataclass
class Curve:
    """Collects points; keeps a copy of the trained weights at the lowest validation loss when `keep_best`."""

    keep_best: bool = False
    points: list[Point] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int | None = None

    def add(self, ledger: Ledger, learning_rate: float | None, acceptance_rate: float | None) -> None:
        """Append where the run stands now; `acceptance_rate` is the gate's own, of late and without its burn-in."""
        loss, score = ledger.take_means()
        spent = {name: getattr(ledger, name) for name in SPENT}
        spent |= {"step": ledger.steps, "seconds": round(ledger.seconds, 3)}
        told = {"learning_rate": learning_rate, "train_loss": loss, "gate_score": score}
        self.points.append(Point(**spent, **told, acceptance_rate=acceptance_rate))

    def add_validation(self, metrics: dict[str, float], model: nn.Module) -> None:
        """Put validation metrics on the last point."""
        self.points[-1].validation = metrics
        if self.keep_best and metrics["loss"] <= min(p.validation["loss"] for p in self.points if p.validation):
            self.best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            self.best_step = self.points[-1].step

    def restore_best(self, model: nn.Module) -> None:
        """Put the best weights back into `model`."""
        model.load_state_dict(self.best, strict=False)

    def chosen(self) -> Point | None:
        """The point whose weights are the final model's."""
        evaluated = (point for point in reversed(self.points) if point.validation)
        return next((point for point in evaluated if not self.keep_best or point.step == self.best_step), None)

    def state_dict(self) -> dict[str, Any]:
        return {"points": [point.model_dump() for point in self.points], "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points = [Point(**point) for point in state["points"]]
        self.best, self.best_step = {}, state["best_step"]


@dataclass
class RunState:
    """The parts of a run that change while it trains, beside the weights and the optimizer.

    identity: what makes this run this run; resuming a checkpoint of another identity is refused.
    total_over_ranks: sums a float64 vector over all processes.
    """

    gate: Gate
    tokens: TokenSelection
    controllers: Sequence[Controller]
    gate_log: GateLog
    total_over_ranks: Callable[[Tensor], Tensor]
    ledger: Ledger = field(default_factory=Ledger)
    meter: FlopMeter = field(default_factory=FlopMeter)
    curve: Curve = field(default_factory=Curve)
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._trained, parts = False, ("gate", "tokens", "gate_log", "ledger", "curve")
        self._at_first = copy.deepcopy({name: getattr(self, name).state_dict() for name in parts})

    def begin(self, resumed: bool) -> None:
        """Nothing is left of a step that came to no end; unless resumed, nor of an earlier training: nothing is spent,
        nothing on the curve, and what gate and token selection learnt is forgotten. Only what controllers did stays."""
        self.ledger.forget()
        if not resumed:  # what was evaluated before is not on the curve; a gate may have been given what it knows
            for name in self._at_first if self._trained else ("ledger", "curve"):
                getattr(self, name).load_state_dict(copy.deepcopy(self._at_first[name]))
        self._trained = True

    def end(self) -> None:
        """Training is over, for whatever reason: the model is left ready for inference."""
        for controller in self.controllers:
            controller.end()
