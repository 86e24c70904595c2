"""A budget in epochs is the steps the plain Trainer takes; processes that make batches change nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import training_runs as runs
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import lorakit
from lorakit.errors import ParameterError
from lorakit.params import Params
from lorakit.runs.assembly import Assembled, budget_of
from lorakit.training import Budget
from lorakit.training.arguments import training_arguments

QUICK = runs.QUICK | {"max_train": 40, "batch_size": 8, "budget_unit": "epochs"}


class Plain(torch.nn.Linear):
    def forward(self, x):
        return {"loss": super().forward(x).square().mean()}


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs"),
    [(40, 8, 1, 3.0), (41, 8, 1, 2.0), (41, 8, 4, 1.0), (41, 8, 4, 2.5), (7, 16, 2, 0.5), (100, 10, 1, 0.25),
     (30, 1, 1, 0.1)],
)  # fmt: skip
def test_epochs_are_the_steps_of_the_plain_trainer(tmp_path, rows, batch, accumulation, epochs):
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, use_cpu=True,
        num_train_epochs=epochs, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    plain = Trainer(Plain(2, 1), arguments, train_dataset=[{"x": torch.ones(2)}] * rows)
    plain.train()
    asked = {"batch_size": batch, "gradient_accumulation": accumulation, "budget": epochs, "budget_unit": "epochs"}
    assert budget_of(Params(**asked), rows) == Budget(plain.state.global_step, "accepted_steps")


def test_a_gated_run_of_some_epochs_takes_as_many_accepted_steps_as_one_without():
    plain = lorakit.run(QUICK | {"budget": 1.5})
    gated = lorakit.run(QUICK | {"budget": 1.5, "gate": "random", "gate_rate": 0.5, "gate_burn_in": 0})
    assert plain.costs.accepted_steps == gated.costs.accepted_steps == plain.costs.steps == 8 < gated.costs.steps
    assert plain.costs.examples == 60 + 4  # ten batches' fifth ends an epoch; 7.5 steps are eight
    told = "budget: 1.5 epochs of 40 rows are 8 accepted steps"
    assert told in plain.notes and told in gated.notes
    assert (plain.resolved["budget"], plain.resolved["budget_unit"]) == (1.5, "epochs")


def test_adalora_s_own_schedule_is_told_the_steps_of_the_epochs():
    given = {"budget": 2, "method": "peft", "peft_type": "ADALORA", "model": "toy-encoder"}
    record = lorakit.run(QUICK | given)
    assert (record.status, record.costs.accepted_steps) == ("done", 10)


@pytest.mark.parametrize("unit", ["accepted_steps", "steps", "tokens", "flops", "seconds"])
def test_a_part_of_a_step_is_no_budget(unit):
    with pytest.raises(ParameterError, match="budget=0.5: must be at least 1, but of epochs"):
        lorakit.run({"budget": 0.5, "budget_unit": unit})


def test_no_note_without_epochs():
    silent = SimpleNamespace(notes=[], train=[])
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    assert Assembled(Params(), model, None, silent, silent).notes == []


@pytest.mark.parametrize("task", ["toy-reviews", "toy-instruct"])
def test_two_processes_that_make_batches_give_the_same_run_bitwise(tmp_path, task):
    asked = training_arguments(Params(dataloader_num_workers=2), str(tmp_path))
    found = []
    assert asked.dataloader_num_workers == 2
    for workers in (0, 2):
        run_dir = tmp_path / str(workers)
        given = {
            "task": task,
            "budget": 1.2,
            "dataloader_num_workers": workers,
            "run_dir": str(run_dir),
            "save_steps": 3,
        }
        record = lorakit.run(QUICK | given | {"model": "toy-decoder" if task == "toy-instruct" else "toy-encoder"})
        curve = [point.model_dump(exclude={"seconds"}) for point in record.curve]
        found.append((curve, record.final, load_file(run_dir / "adapter" / "adapter_model.safetensors")))
    (curve, final, weights), (other_curve, other_final, other_weights) = found
    assert curve == other_curve and final == other_final and weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_a_trial_of_less_than_a_step_is_refused():
    with pytest.raises(ParameterError, match="search_budget=0.5: must be at least 1, but of epochs"):
        lorakit.search({"search_rates": [1e-3], "search_budget": 0.5})
    with pytest.raises(ParameterError, match="search_budget=60.*of which at most the run's budget"):
        lorakit.search({"search_rates": [1e-3], "budget_unit": "epochs", "budget": 3})
