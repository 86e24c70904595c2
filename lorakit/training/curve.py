"""The curve of a run: one point per log, with validation where it was evaluated, and the best weights if asked for."""

from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.records import Point
from lorakit.training.costs import SPENT, Ledger


@dataclass
class Curve:
    """Collects points; keeps a copy of the trained weights at the lowest validation loss when `keep_best`."""

    keep_best: bool = False
    points: list[Point] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_step: int | None = None

    def add(self, ledger: Ledger, learning_rate: float | None, acceptance_rate: float | None) -> None:
        """Append where the run stands now; `acceptance_rate` is the gate's own, of late and without its burn-in."""
        loss, score = ledger.take_means()
        spent = {name: getattr(ledger, name) for name in SPENT}
        spent |= {"step": ledger.steps, "seconds": round(ledger.seconds, 3)}
        told = {"learning_rate": learning_rate, "train_loss": loss, "gate_score": score}
        self.points.append(Point(**spent, **told, acceptance_rate=acceptance_rate))

    def add_validation(self, metrics: dict[str, float], model: torch.nn.Module) -> None:
        """Put validation metrics on the last point."""
        self.points[-1].validation = metrics
        if self.keep_best and metrics["loss"] <= min(p.validation["loss"] for p in self.points if p.validation):
            self.best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            self.best_step = self.points[-1].step

    def restore_best(self, model: torch.nn.Module) -> None:
        """Put the best weights back into `model`."""
        model.load_state_dict(self.best, strict=False)

    def chosen(self) -> Point | None:
        """The point whose weights are the final model's."""
        evaluated = [point for point in self.points if point.validation]
        if self.keep_best:
            evaluated = [point for point in evaluated if point.step == self.best_step]
        return evaluated[-1] if evaluated else None

    def state_dict(self) -> dict[str, Any]:
        return {"points": [point.model_dump() for point in self.points], "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points = [Point(**point) for point in state["points"]]
        self.best_step = state["best_step"]
