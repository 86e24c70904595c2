"""Checkpoints are written whole or not at all, and what is damaged is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import slora_runs
import torch
from pickled import Runs
from training_runs import equal, kill, tiny_bert, trainer, weights
from transformers import trainer as hf_trainer

from lorakit.errors import CheckpointError
from lorakit.files import sha256
from lorakit.training import Budget, checkpoint


@pytest.mark.parametrize("stopped_in", ["torch.save", "os.replace", "lorakit.training.checkpoint.settle"])
def test_a_save_that_is_stopped_leaves_no_checkpoint_and_no_trace(tmp_path, monkeypatch, stopped_in):
    def stop(*_, **__):
        assert not list(tmp_path.glob("checkpoint-*")), "half written under its own name"
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped_in, stop)
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_bert(), tmp_path, save_steps=6).train()
    assert list(tmp_path.iterdir()) == []


def test_a_save_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: happened.append("on disk") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: happened.append(Path(paths[1]).name) or replace(*paths))
    trainer(tiny_bert(), tmp_path, save_steps=20).train()
    files = [path for path in (tmp_path / "checkpoint-20").iterdir()]
    assert len(files) > 7 and happened == ["on disk"] * (len(files) + 1) + ["checkpoint-20"]


def test_the_older_checkpoints_go_once_the_new_one_is_whole(tmp_path, monkeypatch):
    """Of SLoRATrainer, which writes in place and keeps one: killed as it removes the others, it can go on."""
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "save_total_limit": 1}
    made, rotate, whole = slora_runs.slora(slora_runs.lora(), tmp_path, **options), hf_trainer.rotate_checkpoints, []

    def watched(**given):
        newest = checkpoint.numbered(tmp_path)[-1]
        whole.append((newest.name, checkpoint.damage(newest, made.checkpoint_files)))
        rotate(**given)

    monkeypatch.setattr(hf_trainer, "rotate_checkpoints", watched)
    made.train()
    assert whole == [("checkpoint-5", ""), ("checkpoint-10", "")]
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ["checkpoint-10"]


def test_a_run_may_save_at_every_step(tmp_path):
    trainer(tiny_bert(), tmp_path, save_steps=1, budget=Budget(3, "steps")).train()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("first", [True, False])
def test_one_process_alone_clears_what_an_earlier_run_left(tmp_path, monkeypatch, first):
    cleared, run = [], trainer(tiny_bert(), tmp_path, budget=Budget(1, "steps"))
    monkeypatch.setattr(run, "is_world_process_zero", lambda: first)
    monkeypatch.setattr(checkpoint, "begin", lambda *_: cleared.append(1))
    run.train()
    assert len(cleared) == first


def test_what_a_kill_left_goes_where_nothing_more_is_saved(tmp_path):
    def made():
        return trainer(tiny_bert(), tmp_path, save_steps=2, budget=Budget(2, "steps"))

    made().train()
    for name, lock in (("a", True), ("b", False)):
        left = tmp_path / f"{checkpoint.SAVING}.lorakit-{name}"
        (left / "checkpoint-2" if lock else left).mkdir(parents=True)
        if lock:
            (left / ".lock").touch()
    (mine := tmp_path / f"{checkpoint.SAVING}.lorakit-users").mkdir()
    (mine / "notes").touch()
    made().train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "checkpoint-2"]


FILES = [checkpoint.RUN, checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.BEST, *checkpoint.TRAINERS, "rng_state.pth"]
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other bytes": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "text": lambda path: path.write_text("[]"),
    "a byte": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another's": lambda path: path.write_bytes((path.parent / OTHER[path.suffix]).read_bytes()),
}
OTHER = {".pt": "rng_state.pth", ".pth": "scheduler.pt", ".safetensors": "rng_state.pth", ".json": "../other.json"}


def flipped(content: bytes) -> bytes:
    return content[:-200] + bytes([content[-200] ^ 1]) + content[-199:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 18 steps that was killed at 14 and saved at 6 and 12, its weights at the end, how to make it again."""

    def again(folder):
        return trainer(tiny_bert(), folder, save_steps=6, keep_best=True, evaluations=3, budget=Budget(18, "steps"))

    folder = tmp_path_factory.mktemp("saved")
    kill(again(folder), 28)
    (folder / "other.json").write_text("{}")
    whole = again(tmp_path_factory.mktemp("whole"))
    whole.train()
    return folder, weights(whole.model), again


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_an_older_whole_one_resumed(saved, tmp_path, name, damage):
    folder, wanted, again = saved
    shutil.copytree(folder, tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / "checkpoint-12" / name)
    run = again(tmp_path / "run")
    run.train(resume_from_checkpoint=True)
    assert equal(weights(run.model), wanted)
    assert (tmp_path / "run" / "earlier-1" / "checkpoint-12").is_dir()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    shutil.copytree(saved[0] / "checkpoint-12", tmp_path / "run" / "checkpoint-12")
    DAMAGES[damage](tmp_path / "run" / "checkpoint-12" / name)
    with pytest.raises(CheckpointError, match=rf"(?s){name}.*resume=false"):
        again(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))


def test_where_every_checkpoint_is_damaged_each_is_named(saved, tmp_path):
    folder, _, again = saved
    shutil.copytree(folder, tmp_path / "run")
    assert checkpoint.intact(tmp_path / "run", ())[0].name == "checkpoint-12"
    for name in ("checkpoint-6", "checkpoint-12"):
        (tmp_path / "run" / name / "optimizer.pt").unlink()
    told = "(?s)no checkpoint is whole: checkpoint-12: optimizer.pt.*checkpoint-6: optimizer.pt.*resume=false"
    with pytest.raises(CheckpointError, match=told):
        again(tmp_path / "run").train(resume_from_checkpoint=True)
    assert {"checkpoint-6", "checkpoint-12"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_checkpoint_of_two_processes_is_not_resumed_by_one(saved, tmp_path):
    folder, _, again = saved
    shutil.copytree(folder, tmp_path / "run")
    shutil.copy(
        tmp_path / "run" / "checkpoint-12" / "rng_state.pth", tmp_path / "run" / "checkpoint-12" / "rng_state_1.pth"
    )
    with pytest.raises(CheckpointError, match=r"checkpoint-12: written by 2 process\(es\), .* resumed by 1"):
        again(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", checkpoint.LEDGER, checkpoint.STATE])
def test_slora_goes_on_from_a_whole_checkpoint_or_says_what_is_missing(tmp_path, name):
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    whole = slora_runs.slora(slora_runs.lora(), tmp_path, **options)
    whole.train()
    (tmp_path / "checkpoint-10" / name).write_bytes(b"")
    resumed = slora_runs.slora(slora_runs.lora(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(whole.model), weights(resumed.model))
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"checkpoint-10: {name} is missing"):
        slora_runs.slora(slora_runs.lora(), tmp_path, **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_under_another_steps_name_makes_room_for_that_steps(tmp_path):
    """Two of ours have changed names: the run goes on from what the newest name holds, and writes over that name."""

    def made():
        return trainer(slora_runs.lora(), tmp_path / "run", budget=Budget(6, "steps"), save_steps=1)

    kill(made(), 9)
    older, newer = checkpoint.complete(tmp_path / "run")
    for old, new in ((older, "x"), (newer, older.name), (tmp_path / "run" / "x", newer.name)):
        old.rename(tmp_path / "run" / new)
    resumed = made()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.ledger.steps == 6 and not list((tmp_path / "run").glob(".checkpoint*"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", checkpoint.STATE])
def test_pickles_of_a_checkpoint_run_nothing_though_its_digests_fit(tmp_path, name):
    run, ran = tmp_path / "run", tmp_path / "ran"
    trainer(tiny_bert(), run, budget=Budget(2, "steps"), save_steps=1).train()
    place = checkpoint.folder(run, 1)
    torch.save({"a": Runs(ran)}, place / name)
    digests = json.loads((place / checkpoint.MARK).read_text())
    (place / checkpoint.MARK).write_text(json.dumps(digests | {name: sha256(place / name)}))
    resumed = trainer(tiny_bert(), run, budget=Budget(2, "steps"), save_steps=1)
    with pytest.raises(CheckpointError, match=name.split(".")[0]):
        resumed.train(resume_from_checkpoint=str(place))
    assert not ran.exists()
