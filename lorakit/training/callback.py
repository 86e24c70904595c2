"""Between steps: count, move what acts there, decide whether to log, evaluate, save or stop, and keep the curve."""

import math
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from lorakit.progress import Progress
from lorakit.training.costs import SPENT, Budget
from lorakit.training.state import RunState
from lorakit.training.window import Diverged

LOGS_PER_RUN = 40


class StepCallback(TrainerCallback):
    """Keeps the ledger and what acts between steps going; without a budget the Trainer's arguments say the length."""

    def __init__(self, run: RunState, budget: Budget | None = None):
        self.run, self.budget = run, budget

    def share(self, state: Any) -> float:
        """Of the run, done so far."""
        return self.budget.share(self.run.ledger) if self.budget else self.run.ledger.steps / state.max_steps

    def on_train_begin(self, args, state, control, **_):
        for controller in self.run.controllers:
            controller.begin()
        self.run.gate_log.begin(self.budget.steps() if self.budget else state.max_steps)
        self.run.ledger.restart_clock()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        # of a resumed epoch, accelerate tells no sampler that processes share
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(int(state.epoch))

    def on_train_end(self, args, state, control, **_):
        warmup, accepted = args.get_warmup_steps(state.max_steps), self.run.ledger.accepted_steps
        if self.budget is None and self.run.gate.selective and accepted < warmup:
            self.run.gate_log.warn(
                f"the run ended with {accepted} accepted steps, fewer than its warm-up of {warmup}: steps count "
                "candidate batches, so that the rate rose and fell while few of them were trained on; raise max_steps"
            )

    def on_step_begin(self, args, state, control, **_):
        for controller in self.run.controllers:
            controller.begin_step(self.share(state))

    def on_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.run.ledger.commit(self.run.total_over_ranks)
        for controller in self.run.controllers:
            controller.after_step(self.share(state), optimizer)


class RunCallback(StepCallback):
    """Everything a run of a budget does between its steps."""

    def __init__(self, run: RunState, budget: Budget, progress: Progress, evaluations: int, save_steps: int):
        super().__init__(run, budget)
        self.progress, self.evaluations, self.save_steps = progress, evaluations, save_steps
        self.facts: dict[str, float] = {}
        self.seen, self.training = 0.0, False  # share of the budget at the last step's end; not an evaluation after all

    def on_train_begin(self, args, state, control, **_):
        self.seen, self.training = self.share(state), True
        super().on_train_begin(args, state, control)

    def on_train_end(self, args, state, control, **_):
        self.training = False

    def on_step_end(self, args, state, control, **_):
        before, self.seen = self.seen, self.share(state)
        finished = self.seen >= 1
        # beside what the Trainer's own arguments (eval_steps, save_steps, max_steps) and other callbacks asked for
        control.should_evaluate |= finished or _crossed(before, self.seen, self.evaluations)
        control.should_log |= control.should_evaluate or _crossed(before, self.seen, LOGS_PER_RUN)
        control.should_save |= self.save_steps > 0 and (finished or state.global_step % self.save_steps == 0)
        control.should_training_stop |= finished
        if not control.should_evaluate and self.progress.style != "none":  # else with what it finds, or to nobody
            self.progress.update(self.seen, self.facts)

    def on_log(self, args, state, control, logs=None, **_):
        run = self.run
        if run.ledger.loss_steps > 0:  # else the Trainer's summary at the end, not a point of the curve
            run.curve.add(run.ledger, logs.get("learning_rate"), run.gate.acceptance_rate())
            for controller in run.controllers:
                controller.at_point(run.ledger.steps)
            self.facts["loss"] = run.curve.points[-1].train_loss

    def on_evaluate(self, args, state, control, metrics=None, model=None, **_):
        if not self.training:
            return
        if not self.run.curve.points:  # before the first step
            self.run.curve.add(self.run.ledger, None, None)
        validation = strip_prefix(metrics, "eval_")
        if not math.isfinite(validation["loss"]):
            raise Diverged(f"validation loss is {validation['loss']} at step {self.run.ledger.steps}")
        self.run.curve.add_validation(validation, model)
        self.facts["validation"] = validation["loss"]
        self.progress.update(self.seen, self.facts)
        self.run.ledger.restart_clock()

    def on_save(self, args, state, control, **_):
        self.run.ledger.restart_clock()


def strip_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The task's own metrics among the Trainer's (which adds its timings), without the prefix."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: float(value) for name, value in named.items() if name not in timings}


def named(logs: dict[str, Any]) -> dict[str, Any]:
    """As trackers get them: the Trainer's as train/loss and eval/loss, the gate's and what was spent as they are."""
    own = {name: value for name, value in logs.items() if name.startswith("gate/") or name in SPENT}
    return own | rewrite_logs({name: value for name, value in logs.items() if name not in own})


def _crossed(before: float, after: float, parts: int) -> bool:
    """Whether one of `parts` equal marks lies between two shares (a hair early, so that rounding skips none)."""
    return math.floor(after * parts + 1e-9) > math.floor(before * parts + 1e-9)
