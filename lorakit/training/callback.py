"""Between steps: count, decide whether to log, evaluate, save or stop, and keep the curve."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from lorakit.training.controllers import Controller
    from lorakit.training.trainer import BudgetTrainer

LOGS_PER_RUN = 40


class RunCallback(TrainerCallback):
    """Everything a run does between its steps. `trainer` is the BudgetTrainer it belongs to."""

    def __init__(self, trainer: BudgetTrainer, evaluations: int, save_steps: int):
        self.trainer, self.evaluations, self.save_steps = trainer, evaluations, save_steps
        self.facts: dict[str, float] = {}
        self.share = 0.0

    def on_train_begin(self, args, state, control, **_):
        self.share = self.trainer.budget.share(self.trainer.ledger)
        for controller in self.trainer.controllers:
            controller.begin()
        self.trainer.gate_log.begin(self.trainer.budget.steps())
        self.trainer.ledger.restart_clock()

    def on_step_begin(self, args, state, control, **_):
        for controller in self.trainer.controllers:
            controller.begin_step(self.share)

    def on_optimizer_step(self, args, state, control, optimizer=None, **_):
        trainer = self.trainer
        trainer.ledger.commit(trainer.total_over_ranks)
        for controller in trainer.controllers:
            controller.after_step(trainer.budget.share(trainer.ledger), optimizer)

    def on_step_end(self, args, state, control, **_):
        before, self.share = self.share, self.trainer.budget.share(self.trainer.ledger)
        finished = self.share >= 1
        control.should_evaluate = finished or _crossed(before, self.share, self.evaluations)
        control.should_log = control.should_evaluate or _crossed(before, self.share, LOGS_PER_RUN)
        control.should_save = self.save_steps > 0 and (finished or state.global_step % self.save_steps == 0)
        control.should_training_stop = finished
        if state.is_world_process_zero:
            self.trainer.progress.update(self.share, self.facts)

    def on_log(self, args, state, control, logs=None, **_):
        trainer = self.trainer
        if trainer.ledger.loss_steps == 0:  # the Trainer's summary at the end, not a point of the curve
            return
        trainer.curve.add(trainer.ledger, logs.get("learning_rate"), trainer.gate.acceptance_rate())
        for controller in trainer.controllers:
            controller.at_point(trainer.ledger.steps)
        self.facts["loss"] = trainer.curve.points[-1].train_loss

    def on_evaluate(self, args, state, control, metrics=None, **_):
        from lorakit.training.watch import Diverged

        trainer = self.trainer
        if not trainer.is_in_train:
            return
        validation = strip_prefix(metrics, "eval_")
        if not math.isfinite(validation["loss"]):
            raise Diverged(f"validation loss is {validation['loss']} at step {trainer.ledger.steps}")
        trainer.curve.add_validation(validation, trainer.model)
        self.facts["validation"] = validation["loss"]
        trainer.ledger.restart_clock()

    def on_save(self, args, state, control, **_):
        self.trainer.ledger.restart_clock()


class ControllerCallback(TrainerCallback):
    """A controller in a plain Hugging Face Trainer. Its state is not in the Trainer's checkpoints."""

    def __init__(self, controller: Controller):
        self.controller = controller

    def on_train_begin(self, args, state, control, **_):
        self.controller.begin()

    def on_step_begin(self, args, state, control, **_):
        self.controller.begin_step(state.global_step / state.max_steps)

    def on_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.controller.after_step((state.global_step + 1) / state.max_steps, optimizer)

    def on_train_end(self, args, state, control, **_):
        self.controller.end()


def strip_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The task's own metrics among the Trainer's (which adds its timings), without the prefix."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: float(value) for name, value in named.items() if name not in timings}


def _crossed(before: float, after: float, parts: int) -> bool:
    """Whether one of `parts` equal marks lies between two shares (a hair early, so that rounding skips none)."""
    return math.floor(after * parts + 1e-9) > math.floor(before * parts + 1e-9)
