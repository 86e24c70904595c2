"""What a run finds in its folder: an earlier run's checkpoints, damaged ones, another run at work."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import PreTrainedModel

import lorakit
from lorakit.errors import ParameterError
from lorakit.measure import environment
from lorakit.records import read
from lorakit.training import BudgetTrainer

SAVING = {
    **{"budget": 6, "evaluations": 2, "batch_size": 8, "max_train": 64, "max_validation": 32, "max_test": 32},
    **{"latency_repeats": 0, "predict_memory": False, "rank": 2, "save_steps": 2},
}


def adapter(run_dir):
    return load_file(str(run_dir / "adapter" / "adapter_model.safetensors"))


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def kill_at(monkeypatch, step: int) -> None:
    """The run that follows is stopped before step `step` + 1."""
    real = BudgetTrainer.training_step

    def stopping(self, *given):
        if self.ledger.steps >= step:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(BudgetTrainer, "training_step", stopping)


@pytest.mark.parametrize(
    ("changed", "killed_at"),
    [({"learning_rate": 0.02}, 0), ({"learning_rate": 0.02}, 3), ({"budget": 4}, 1), ({"budget": 9}, 5)],
)
def test_a_run_that_started_over_never_ends_with_the_old_ones_weights(tmp_path, monkeypatch, changed, killed_at):
    new = SAVING | changed
    lorakit.run(SAVING | {"run_dir": str(tmp_path / "one")})
    old = adapter(tmp_path / "one")
    lorakit.run(new | {"run_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_at(patched, killed_at)
        lorakit.run(new | {"run_dir": str(tmp_path / "one"), "resume": False})
    assert not (tmp_path / "one" / "adapter").exists()
    resumed = lorakit.run(new | {"run_dir": str(tmp_path / "one")})
    assert equal(adapter(tmp_path / "one"), adapter(tmp_path / "whole"))
    assert any("resumed at step" in note for note in resumed.notes) == (killed_at >= 2)
    assert equal(adapter(tmp_path / "one" / "earlier-1"), old)  # nothing is lost
    assert {"checkpoint-4", "checkpoint-6"} < {path.name for path in (tmp_path / "one" / "earlier-1").iterdir()}


def test_a_run_of_another_method_leaves_the_earlier_model_with_its_own_record(tmp_path):
    given = SAVING | {"budget": 2, "save_steps": 0, "run_dir": str(tmp_path)}
    for method in ("full", "lora"):
        lorakit.run(given | {"method": method})
    assert read(tmp_path / "adapter" / "record.json").method == "lora" and not (tmp_path / "model").exists()
    assert read(tmp_path / "earlier-1" / "model" / "record.json").method == "full"


def test_a_run_that_is_refused_has_moved_nothing(tmp_path):
    """Somebody else's checkpoint, and a model that the run would move away before it is read."""
    given = SAVING | {"budget": 2, "save_steps": 0, "run_dir": str(tmp_path)}
    lorakit.run(given | {"method": "full"})
    (tmp_path / "checkpoint-9999").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for more, told in (
        ({"save_steps": 1, "resume": False}, "holds checkpoint-9999, which lorakit did not write"),
        ({"model": f"{tmp_path}/model"}, "model='.*/model': is what a run left in run_dir"),
    ):
        with pytest.raises(ParameterError, match=told):
            lorakit.run(given | more)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stored", ["another", None])  # None: a lorakit that did not say
def test_a_checkpoint_of_other_code_is_noted(tmp_path, monkeypatch, stored):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_at(patched, 3)
        patched.setattr(environment, "code_fingerprint", lambda: stored)
        lorakit.run(SAVING | {"run_dir": str(tmp_path)})
    for noted in (True, False):  # the second time from a checkpoint of this code
        record = lorakit.run(SAVING | {"run_dir": str(tmp_path)})
        assert record.status == "done"
        assert ("resumed from a checkpoint that other code wrote" in record.notes) == noted


def test_a_second_run_in_the_folder_is_refused_by_name(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ParameterError, match="run_dir=.*another run is at work there"):
        lorakit.run(SAVING | {"run_dir": str(tmp_path)})
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert lorakit.run(SAVING | {"run_dir": str(tmp_path)}).status == "done"


def test_a_point_before_the_first_step_changes_nothing_after_it_and_stands_once(tmp_path, monkeypatch):
    plain = lorakit.run(SAVING)
    first = SAVING | {"evaluate_first": True, "run_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_at(patched, 5)
        lorakit.run(first)
    run = lorakit.run(first)
    assert any("resumed at step 4" in note for note in run.notes)
    zero, *others = run.curve
    assert zero.step == zero.tokens == zero.flops == 0 and zero.train_loss is None
    assert zero.validation["loss"] > others[-1].validation["loss"] > 0
    assert [(p.step, p.train_loss, p.validation) for p in others] == [
        (p.step, p.train_loss, p.validation) for p in plain.curve
    ]
    assert run.final == plain.final and run.costs.flops == plain.costs.flops


def test_a_run_that_ended_leaves_no_model_and_no_trainer_in_memory():
    def alive() -> Counter:
        gc.collect()
        kinds = (BudgetTrainer, PreTrainedModel, torch.optim.Optimizer)
        return Counter(kind for thing in gc.get_objects() for kind in kinds if issubclass(type(thing), kind))

    before = alive()
    lorakit.run(SAVING | {"gate": "random", "gate_burn_in": 1, "save_steps": 0})
    assert alive() == before
