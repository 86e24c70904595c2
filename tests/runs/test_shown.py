"""What is seen of a run while it works, and that a screen which cannot be written to ends none."""

from __future__ import annotations

import errno
import io
import re
import sys

import pytest
import training_runs as runs
from rich.console import Console
from rich.file_proxy import FileProxy

import lorakit
from lorakit import progress

QUICK = runs.QUICK | {"budget": 6, "evaluations": 2, "batch_size": 8, "max_train": 64, "rank": 2}


@pytest.mark.parametrize("style", ["bar", "plain"])
def test_the_progress_ends_with_the_last_validation_loss_and_says_what_it_waits_for(monkeypatch, capfd, style):
    monkeypatch.setenv("LORAKIT_PROGRESS", style)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    console = Console(file=terminal, width=120, _environ={"TERM": "xterm"})
    monkeypatch.setattr(progress, "CONSOLE", console)
    record = lorakit.run(QUICK | {"latency_repeats": 1, "predict_memory": True})
    shown = terminal.getvalue() if style == "bar" else capfd.readouterr().out
    rows = [row for row in re.split(r"[\r\n]+", shown) if "/" in row]
    last = [row for row in rows if {"bar": "6/6", "plain": "100%"}[style] in row and "loss" in row]
    assert last and all(f"validation {record.final['validation']['loss']:.3g}" in row for row in last)
    waits = {"evaluating": 3, "predicting memory": 1, "measuring latency": 1}
    found = {what: sum(row.rstrip().endswith(f"  {what}") for row in rows) for what in waits}
    assert found == waits if style == "plain" else all(what in shown for what in waits)


class Broken(io.StringIO):
    def isatty(self):
        return True

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("style", ["bar", "plain"])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, ""), OSError(errno.ENOSPC, ""), ValueError("I/O operation on closed file")]
)
def test_progress_that_cannot_be_shown_ends_no_run(monkeypatch, style, error):
    monkeypatch.setenv("LORAKIT_PROGRESS", style)
    monkeypatch.setattr(Broken, "error", error, raising=False)
    if style == "bar":
        monkeypatch.setattr(progress, "CONSOLE", Console(file=Broken(), _environ={"TERM": "xterm"}))
    else:
        monkeypatch.setattr(sys, "stdout", Broken())
    assert lorakit.run(QUICK).status == "done"
    assert not isinstance(sys.stdout, FileProxy) and not isinstance(sys.stderr, FileProxy)
