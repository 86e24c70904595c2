"""Rows timed in turns: what is a ratio to what, on numbers made up; that a whole run of the command works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit import records
from lorakit.analysis.tables import Table, timing_table
from lorakit.errors import LorakitError, ParameterError
from lorakit.files import PROJECT
from lorakit.runs import sweep, timing


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def asked(rows: str) -> dict[str, sweep.Run]:
    return {run.method: run for run in sweep.plan(PROJECT, "toy", rows)}


def test_a_setting_is_timed_row_by_row_and_written_where_asked(tmp_path, capsys):
    assert timing.main(["toy", "--rows", "lora slora qlora", "--steps", "3", "--output", str(tmp_path)]) == 0
    found = {record.row: record for record in records.read_all(tmp_path, kind="timing")}
    assert set(found) == {"lora", "slora", "qlora", "twin"} and records.read_all(tmp_path) == []
    for record in found.values():
        told = record.details["timing"]
        assert told["steps"] == 3 and 0 < told["padding"] < 1 and record.status == "done"
        for name in ("step", "answer", "merged"):
            for low, middle, high in told[name].values():
                assert 0 < low <= middle <= high
        assert record.fingerprints["code"] and record.environment["versions"]
    assert found["lora"].details["timing"]["step"]["ratio"] == [1, 1, 1]
    out = capsys.readouterr().out
    assert "QLoRA" in out and "1.00 [1.00, 1.00]" in out


def test_ratios_are_of_steps_side_by_side_after_warm_up_and_burn_in(monkeypatch):
    burn_in = asked("slora")["slora"].params.gate_burn_in
    skipped = timing.WARM_UP + 4 // 5 + burn_in
    own = {"lora": [2.0, 4.0, 2.0, 4.0], "slora": [1.0, 8.0, 1.0, 8.0], "twin": [2.0, 4.0, 2.0, 5.0]}

    def made_up(trainers, steps):
        assert steps == skipped + 4 + 1
        for trainer in trainers:
            if trainer.gate.selective:
                trainer.gate_log.decisions[:] = [True] * skipped + [False, True, False, True, True]
        return [[99.0] * skipped + own[row] + [77.0] for row in ("lora", "slora", "twin")]

    answers = iter(np.arange(1.0, 1000.0))
    monkeypatch.setattr(timing, "lockstep", made_up)
    monkeypatch.setattr(timing, "inference_latency", lambda *_, **__: next(answers))
    found = {record.row: record.details["timing"] for record in timing.timed(asked("lora slora"), 4)}
    assert found["slora"]["step"] == {"ms": [1000, 4500, 8000], "ratio": [0.5, 1.25, 2.0]}
    assert found["slora"]["accepted"] == 18 / 2 / 3 and found["lora"]["accepted"] == 1  # seconds an accepted step
    assert found["twin"]["step"]["ratio"] == [1, 1, 1.0625]
    # beside the weights: a warm-up of each, then 4, 5, 6; 7, 8, 9; …
    assert found["lora"]["answer"]["ms"] == np.percentile([4, 7, 10, 13], [25, 50, 75]).tolist()
    assert found["twin"]["answer"]["ratio"][1] == np.median([6 / 4, 9 / 7, 12 / 10, 15 / 13])


def test_padding_is_the_share_of_places_without_a_word():
    class Told:
        class task:
            train = {"input_ids": [[0] * 4, [0] * 2, [0] * 3, [0] * 3, [0] * 9]}

        class params:
            batch_size = 2

    assert timing._padding(Told) == pytest.approx(2 / 14)  # the last batch is not whole
    Told.params.batch_size = 6
    assert timing._padding(Told) == 0


def test_the_table_says_what_there_is():
    record = records.Record(setting="s", method="qlora", seed=0, status="done", kind="timing", details={"timing": {
        "steps": 9, "padding": 0.225, "accepted": None, "step": {"ms": [1, 2, 3000], "ratio": [0.9, 1.005, 1.126]},
        "answer": {"ms": [1, 1234.56, 3], "ratio": [1, 1, 1]}}})  # fmt: skip
    table = timing_table([record])
    assert table.to_dict("records") == [{
        "method": "QLoRA", "step ms": "2.0", "step ×": "1.00 [0.90, 1.13]", "accepted step ×": "-",
        "answer ms": "1,234.6", "answer ×": "1.00 [1.00, 1.00]", "answer, merged ms": "-", "answer, merged ×": "-",
        "padding": "22.5 %"}]  # fmt: skip
    assert "QLoRA" in Table(table).markdown()


def test_ratios_to_a_gated_reference_and_to_one_that_cannot_be_merged(monkeypatch, tmp_path):
    skipped = timing.WARM_UP + asked("slora")["slora"].params.gate_burn_in

    def made_up(trainers, steps):
        for trainer in trainers:
            if trainer.gate.selective:
                trainer.gate_log.decisions[:] = [True] * skipped + [False, True, False, True]
        return [[2.0] * steps for _ in trainers]

    monkeypatch.setattr(timing, "lockstep", made_up)
    found = {record.row: record.details["timing"] for record in timing.timed(asked("lora slora"), 3, "slora")}
    assert {row: told["accepted"] for row, told in found.items()} == {"lora": 1 / 3, "slora": 1, "twin": 1}
    told = timing.timed(asked("lora head"), 3, "head")
    for record in told:
        records.write(record, tmp_path / record.row / "timing.json")
    table = timing_table(records.read_all(tmp_path, kind="timing")).set_index("method")
    assert table["answer, merged ×"].tolist() == ["-"] * 3 and table.loc["LoRA", "answer, merged ms"] != "-"
    assert "twin" in table.index


def test_what_ends_a_row_is_one_sentence(monkeypatch):
    def ended(trainers, steps):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(timing, "lockstep", ended)
    with pytest.raises(LorakitError, match="^a row could not be timed: out of memory$"):
        timing.timed(asked("lora"), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["toys"], "^SETTING='toys': must be one of"), (["toy", "--rows", "loar"], "^METHODS='loar': toy has"),
     (["toy", "--rows", "head full"], "^reference='lora': must be one of head, full"),
     (["toy", "--rows", "lora", "--steps", "2"], "^steps=2: must be at least 3"),
     (["toy", "--rows", "lora", "--output", __file__], "^--output=.*test_timing.py")],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr(timing, "assemble", None)
    with pytest.raises(ParameterError, match=message):
        timing.main(arguments)
    assert not (Path(PROJECT) / "results" / "toys").exists()
