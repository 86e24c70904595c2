"""Between steps: when a run shows itself, logs, evaluates, saves and stops, and who is told of what."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import training_runs as runs
from slora_runs import arguments, lora
from transformers import TrainerControl

from lorakit.seams import Controller
from lorakit.training import Budget, Ledger, SLoRATrainer
from lorakit.training.callback import RunCallback, StepCallback, _crossed, named, strip_prefix


@pytest.fixture
def clock(monkeypatch):
    """The time of the ledger, in a list."""
    now = [5000.0]
    monkeypatch.setattr("lorakit.training.costs.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


# when a run does what -------------------------------------------------------------------------------


def test_points_evaluations_and_checkpoints_of_a_run():
    done = {"should_log": [], "should_evaluate": [], "should_save": [], "should_training_stop": []}
    ledger, shown = Ledger(), []
    progress = SimpleNamespace(style="bar", update=lambda share, facts: shown.append(share))
    callback = RunCallback(SimpleNamespace(ledger=ledger), Budget(120, "steps"), progress, evaluations=3, save_steps=50)
    for ledger.steps in range(1, 121):
        control = TrainerControl(should_log=ledger.steps == 1)  # as somebody else asked for
        callback.on_step_end(None, SimpleNamespace(global_step=ledger.steps), control)
        for name, steps in done.items():
            steps += [ledger.steps] * getattr(control, name)
    assert done["should_log"] == sorted({1, 40, 80, *range(3, 121, 3)})
    assert (done["should_evaluate"], done["should_save"]) == ([40, 80, 120], [50, 100, 120])
    assert done["should_training_stop"] == [120]
    assert shown == [step / 120 for step in range(1, 120) if step % 40]  # the others with what the evaluation finds
    asked = TrainerControl(*[True] * 5)
    ledger.steps = 5
    callback.on_step_end(None, SimpleNamespace(global_step=5), asked)
    assert all((asked.should_training_stop, asked.should_evaluate, asked.should_save, asked.should_log))
    assert len(shown) == 117


@pytest.mark.parametrize(
    ("before", "after", "parts", "crossed"),
    [(0.0, 0.5, 2, True), (0.5, 0.9, 2, False), (0.2, 0.3, 4, True), (0.3, 0.9, 1, False), (0.0, 1.0, 1, True),
     (0.0, 1 - 5e-10, 1, True), (0.0, 1 - 1.5e-9, 1, False), (1 - 1.5e-9, 1.0, 1, True), (1 - 5e-10, 1.0, 1, False)],
)  # fmt: skip
def test_a_mark_is_crossed_once_a_hair_early(before, after, parts, crossed):
    assert _crossed(before, after, parts) == crossed


def test_the_tasks_metrics_are_those_that_are_no_timings():
    timings = {f"eval_{name}": 9.0 for name in ("runtime", "samples_per_second", "model_preparation_time")}
    found = strip_prefix({"eval_loss": torch.tensor(2.0), "eval_rows": 3, "epoch": 1.0, "loss": 4.0} | timings, "eval_")
    assert json.dumps(found) == '{"loss": 2.0, "rows": 3.0}'


def test_trackers_get_our_own_names_as_they_are():
    logs = {"loss": 1.0, "eval_loss": 2.0, "test_loss": 3.0, "gate/accept": 4.0, "flops": 5.0, "tokens": 6}
    ours = {"gate/accept": 4.0, "flops": 5.0, "tokens": 6}
    assert named(logs) == {"train/loss": 1.0, "eval/loss": 2.0, "test/loss": 3.0} | ours


# who is told of what --------------------------------------------------------------------------------


class Told(Controller):
    """Keeps what it is told."""

    name = "told"

    def __init__(self):
        self.seen = []

    def begin(self):
        self.seen.append("begin")

    def begin_step(self, share):
        self.seen.append(share)

    def after_step(self, share, optimizer):
        self.seen.append((share, type(getattr(optimizer, "optimizer", optimizer)).__name__))

    def at_point(self, step):
        self.seen.append(f"point {step}")

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize("budget", [True, False])
def test_a_controller_is_told_in_order(tmp_path, budget):
    told, planned = Told(), []
    if budget:
        run = runs.trainer(lora(), tmp_path, budget=Budget(2, "steps"), controllers=[told])
    else:
        data = {"train_dataset": runs.rows(), "data_collator": runs.collate, "controllers": [told]}
        run = SLoRATrainer(lora(), arguments(tmp_path, max_steps=2), **data)
    run.gate_log.begin = planned.append
    run.train()
    points = [["point 1"], ["point 2"]] if budget else [[], []]
    expected = ["begin", 0.0, (0.5, "AdamW"), *points[0], 0.5, (1.0, "AdamW"), *points[1], "end"]
    assert told.seen == expected and planned == [2]


@pytest.mark.parametrize(("unit", "planned"), [("steps", 5), ("accepted_steps", 5), ("tokens", None), ("flops", None)])
def test_a_budget_says_how_many_steps_it_is(unit, planned):
    assert Budget(5, unit).steps() == planned


def test_a_run_shows_what_it_found_last(tmp_path):
    run, shown = runs.trainer(lora(), tmp_path, budget=Budget(4, "steps"), evaluations=2), []
    run.progress.style, run.progress.update = "plain", lambda share, facts: shown.append((share, dict(facts)))
    run.args.eval_on_start = True
    run.train()
    zero, first, second, third, last = run.curve.points
    told = [{"validation": zero.validation["loss"]}]
    told += [{"loss": point.train_loss, "validation": point.validation["loss"]} for point in (second, last)]
    assert shown == [(0, told[0]), (0.25, told[0]), (0.5, told[1]), (0.75, told[1]), (1.0, told[2])]
    assert first.validation is third.validation is None
    found = last.validation
    run.evaluate()
    assert last.validation is found and len(shown) == 5


def test_the_seconds_are_those_of_the_steps(tmp_path, clock):
    """Of what comes between them, an evaluation, a save and the start, none."""

    def slow(method, seconds):
        def taken(*given, **options):
            clock[0] += seconds
            return method(*given, **options)

        return taken

    folder = tmp_path / "not" / "there"
    run = runs.trainer(lora(), folder, budget=Budget(4, "steps"), evaluations=2, save_steps=1)
    for name, seconds in (("training_step", 1), ("evaluate", 100), ("_save_checkpoint", 1000)):
        setattr(run, name, slow(getattr(run, name), seconds))
    run.train()
    assert [point.seconds for point in run.curve.points] == [2, 4, 6, 8]
    assert run._get_output_dir(None) == str(folder)  # no longer where the last checkpoint was written


def test_a_sampler_is_told_the_epoch_where_it_can_be():
    seen, state = [], SimpleNamespace(epoch=2.5)  # resumed in the middle of it
    callback = StepCallback(None)
    callback.on_epoch_begin(None, state, None, train_dataloader=SimpleNamespace(set_epoch=seen.append))
    callback.on_epoch_begin(None, state, None, train_dataloader=[])
    assert seen == [2]
