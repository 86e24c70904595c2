"""How many of the package's files one optimizer step passes through: what a reader opens to follow it."""

from __future__ import annotations

import sys
from pathlib import Path

import decoders
import pytest
import training_runs as runs

import lorakit
from lorakit.gates import build_gate
from lorakit.settings import Gating
from lorakit.tokens import build_tokens
from lorakit.training import Budget, BudgetTrainer

PACKAGE = Path(lorakit.__file__).parent
PLAIN, GATED, CHOSEN = 12, 18, 20
WATCHED = 6  # the first steps look at things once, as at whether a gradient arrives


class _Over(Exception):
    """The step that was to be seen is over."""


def trainer(folder, gate: str = "none", mode: str = "") -> BudgetTrainer:
    model = decoders.adapted(decoders.of("gemma"))
    settings = Gating(method="flora", topk_tokens=0.3, mode=mode or "gather")
    return runs.trainer(
        model, folder, budget=Budget(200, "steps"), language=True, params={"batch_size": 4, "gradient_accumulation": 1},
        gate=build_gate(runs.batch_gate(gate), model, "causal") if gate != "none" else None,
        tokens=build_tokens(settings, model, "causal") if mode else None,
    )  # fmt: skip


def files_of_a_step(run: BudgetTrainer) -> list[str]:
    """Files of the package in which a function was called between one step's batches and the next one's."""
    fetch, count, files = run.get_batch_samples, [], set()

    def seen(frame, event, _):
        if event == "call":
            files.add(frame.f_code.co_filename)

    def watched(*given):
        sys.setprofile(None)
        count.append(None)
        if len(count) > WATCHED:
            raise _Over
        if len(count) == WATCHED:
            sys.setprofile(seen)
        return fetch(*given)

    run.get_batch_samples = watched
    try:
        with pytest.raises(_Over):
            run.train()
    finally:
        sys.setprofile(None)
    paths = (Path(name) for name in files)
    return sorted(str(path.relative_to(PACKAGE)) for path in paths if path.is_relative_to(PACKAGE))


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, PLAIN), ({"gate": "novelty"}, GATED), ({"mode": "gather"}, CHOSEN), ({"mode": "fractional"}, CHOSEN)],
)
def test_a_step_passes_through_few_files(tmp_path, options, limit):
    files = files_of_a_step(trainer(tmp_path, **options))
    assert "training/gated.py" in files and len(files) <= limit, files
