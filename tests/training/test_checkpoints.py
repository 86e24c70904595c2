"""Checkpoints are written whole or not at all, and what is damaged is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from training_runs import tiny_bert, trainer


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
