"""Whose a checkpoint is, what is wrong with its files, and which ones go: by hand, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import Alternating
from transformers import TrainerState

from lorakit.errors import CheckpointError, ParameterError
from lorakit.gates.log import GateLog
from lorakit.seams import AllTokens, Controller
from lorakit.training import Ledger, checkpoint
from lorakit.training.state import RunState


def state(**identity) -> RunState:
    gate = Alternating()
    return RunState(gate, AllTokens(), (), GateLog(gate), lambda vector: vector, identity=identity)


def saved(run: RunState, folder: Path, step: int) -> Path:
    made = checkpoint.folder(str(folder / "aside"), step)
    made.mkdir(parents=True)
    checkpoint.save_run(run, made, str(folder))
    return checkpoint.folder(folder, step)


def names(paths) -> list[str]:
    return [path.name for path in paths]


def test_whose_the_folders_are(tmp_path):
    """A file, a link and another name are no checkpoints; one of ours is known by its mark or by what it says."""
    held = {"checkpoint-3": [checkpoint.MARK], "checkpoint-10": [checkpoint.RUN], "checkpoint-9": ["optimizer.pt"],
            "checkpoint-20": [checkpoint.MARK, checkpoint.RUN], "checkpoint-1a": [checkpoint.RUN]}  # fmt: skip
    for name, files in held.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    (tmp_path / "checkpoint-4").touch()
    (tmp_path / "checkpoint-5").symlink_to(tmp_path / "checkpoint-20")
    assert names(checkpoint.numbered(str(tmp_path))) == [
        "checkpoint-3",
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-20",
    ]
    assert names(checkpoint.ours(tmp_path)) == ["checkpoint-3", "checkpoint-10", "checkpoint-20"]
    assert names(checkpoint.complete(tmp_path)) == ["checkpoint-10", "checkpoint-20"]
    with pytest.raises(ParameterError, match="^run_dir=.*: holds checkpoint-9, which lorakit did not write"):
        checkpoint.require_room(tmp_path)
    checkpoint.begin(str(tmp_path), f"{tmp_path}/checkpoint-3/../checkpoint-10", "checkpoint-1a")
    assert names(checkpoint.ours(tmp_path)) == ["checkpoint-3", "checkpoint-10"]
    assert {path.name for path in (tmp_path / "earlier-1").iterdir()} == {"checkpoint-20", "checkpoint-1a"}
    checkpoint.begin(tmp_path, None)
    assert names(checkpoint.numbered(tmp_path)) == ["checkpoint-9"]


def test_the_newest_two_of_a_run_are_kept_and_all_of_others(tmp_path):
    mine, other = state(seed=1, code="a"), state(seed=2, code="a")
    saved(other, tmp_path, 5)
    for step in (6, 7, 8):
        saved(mine, tmp_path, step)
    assert names(checkpoint.complete(tmp_path)) == ["checkpoint-5", "checkpoint-7", "checkpoint-8"]
    (tmp_path / "checkpoint-8" / checkpoint.RUN).write_text("{")  # what is damaged is none of the two
    found, told = checkpoint.intact(str(tmp_path), [checkpoint.RUN])
    assert found.name == "checkpoint-7" and len(told) == 1
    assert told[0].startswith("checkpoint-8: run.json is damaged: ")
    saved(state(seed=1, code="b"), tmp_path, 9)  # other code is no other run
    kept = ["checkpoint-5", "checkpoint-7", "checkpoint-8", "checkpoint-9"]
    assert names(checkpoint.complete(tmp_path)) == kept
    saved(mine, tmp_path, 8)
    assert names(checkpoint.complete(tmp_path)) == ["checkpoint-5", "checkpoint-8", "checkpoint-9"]
    assert {path.name for path in (tmp_path / "aside").iterdir()} == {"checkpoint-6", "checkpoint-7", "replaced"}


class Counting(Controller):
    name = "counting"
    count = 3

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_a_run_is_read_as_it_was_written(tmp_path):
    run, again, other = state(seed=(1, 2)), state(seed=(1, 2)), state(seed=3, more=None)
    run.controllers, again.controllers = [Counting()], [Counting()]
    again.controllers[0].count = 0
    run.ledger.load_state_dict(Ledger(steps=4, tokens=7, seconds=1.5).state_dict())
    run.curve.add(run.ledger, 0.1, 1.0)
    run.curve.best, run.curve.best_step = {"weight": torch.arange(6.0).view(2, 3).T}, 4
    run.meter.measure("pass", (2, 3), lambda: torch.ones(2, 3) @ torch.ones(3, 2))
    run.gate.seen = 5
    run.gate_log.decided(True, 0.5)
    path = saved(run, tmp_path, 4)
    checkpoint.load_run(again, str(path))
    assert again.ledger == run.ledger and again.curve.points == run.curve.points
    assert torch.equal(again.curve.best["weight"], run.curve.best["weight"]) and again.curve.best_step == 4
    assert again.meter.known == run.meter.known and len(run.meter.known) == 1
    assert (again.gate.seen, again.controllers[0].count, again.gate_log.decisions) == (5, 3, [True])
    assert json.loads((path / checkpoint.MARK).read_text()).keys() == {"gate.pt", "run.json", "best.safetensors"}
    told = r"checkpoint of another run: seed=\[1, 2\] there, 3 here; choose another run_dir"
    with pytest.raises(CheckpointError, match=told):
        checkpoint.load_run(other, path)


def test_weights_are_the_trained_ones(tmp_path):
    model, path = nn.Linear(2, 3, bias=False), tmp_path / "not" / "there"
    model.weight = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    for _ in range(2):  # and over it
        checkpoint.save_weights(model, str(path))
    assert load_file(path / checkpoint.WEIGHTS).keys() == {"weight"}
    other = nn.Linear(2, 3, bias=False)
    checkpoint.load_weights(other, str(path))
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(CheckpointError, match=r"there: weight is \(3, 2\), here \(3, 4\)"):
        checkpoint.load_weights(nn.Linear(4, 3, bias=False), path)
    many = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(5))
    with pytest.raises(CheckpointError, match=r"than this run: 0.weight, 1.weight, 2.weight, 3.weight$"):
        checkpoint.load_weights(many, path)


def test_what_is_wrong_with_a_file_is_said(tmp_path, monkeypatch):
    def steps(count):
        TrainerState(global_step=count).save_to_json(tmp_path / "trainer_state.json")
        return checkpoint.damage(str(tmp_path), ["trainer_state.json"])

    assert checkpoint.damage(tmp_path, []) == steps(1) == ""
    assert steps(0) == "trainer_state.json is damaged: it says of no step"
    (tmp_path / checkpoint.MARK).write_text("[]")
    assert checkpoint.damage(tmp_path, []) == ".lorakit is damaged: no mapping"
    (tmp_path / checkpoint.MARK).write_text("")
    assert steps(1) == ""
    (tmp_path / checkpoint.MARK).write_text('{"trainer_state.json": "0"}')
    assert steps(1) == "trainer_state.json is damaged: its sha256 is not that of what was written"
    assert checkpoint.damage(tmp_path, ["x.pt"]).startswith("x.pt is missing; without it")
    (tmp_path / checkpoint.RUN).write_text('{"identity": {}, "ledger": {}, "flops": [], "curve": {"best_step": null}}')
    assert checkpoint.damage(str(tmp_path), [checkpoint.RUN, checkpoint.BEST]) == ""

    def unreadable(_):
        raise OSError("a\n" * 300)

    monkeypatch.setattr(checkpoint, "sha256", unreadable)
    assert steps(1) == f"trainer_state.json is damaged: OSError: {'a ' * 100}"


def test_what_cannot_be_read_is_named_with_the_way_out():
    with pytest.raises(CheckpointError) as told, checkpoint.reading("here/it"):
        raise ValueError("b\n" * 300)
    assert str(told.value) == f"here/it is damaged, or of another run: ValueError: {'b ' * 100}; {checkpoint.REMEDY}"
    with pytest.raises(CheckpointError, match="^as it was$"), checkpoint.reading("here/it"):
        raise CheckpointError("as it was")


@pytest.mark.parametrize(
    ("processes", "half", "more"),
    [(1, False, ["rng_state.pth"]), (2, False, ["rng_state_0.pth", "rng_state_1.pth"]),
     (1, True, ["rng_state.pth", "scaler.pt"])],
)  # fmt: skip
def test_the_files_of_a_checkpoint(processes, half, more):
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=processes, fp16=half))
    first = ["gate.pt", "trainable.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
    assert checkpoint.Resuming.checkpoint_files.fget(trainer) == first + more
