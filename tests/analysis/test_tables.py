"""The table says what the records say, in fixed digits, and `lorakit table` leaves nothing half-done."""

from __future__ import annotations

import math

import pytest
from synthetic_records import diverged, record, search

from lorakit import table
from lorakit.errors import DataError, ParameterError
from lorakit.records import Costs, write


def runs():
    finished = [record(m, s, floor=0.3 + 0.1 * i) for i, m in enumerate(("full", "lora")) for s in range(3)]
    return [*finished, diverged("lora", 3)]


def cells(text: str) -> list[dict[str, str]]:
    """Rows of the Markdown tables in `text`, each as heading -> cell."""
    rows = []
    for part in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n")]
        rows += [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    return rows


@pytest.fixture
def folder(tmp_path):
    for run in runs():
        write(run, tmp_path / "results" / run.method / f"s{run.seed}.json")
    write(search("lora"), tmp_path / "results" / "lora" / "search.json")
    return tmp_path / "results"


def test_cells_are_the_records():
    full, lora, full_cost, lora_cost = cells(table.results_table(runs(), markdown=True))
    assert full == {
        "method": "full fine-tuning", "seeds": "3", "status": "3 done",
        "test accuracy": "0.860 ± 0.010", "validation loss": "0.325 ± 0.010",
        "trainable": "1,000", "total/trainable": "64.0", "adapter MiB": "1.50",
    }  # fmt: skip
    assert (lora["seeds"], lora["status"], lora["test accuracy"]) == ("4", "3 done, 1 diverged", "0.850 ± 0.010")
    assert full_cost == {
        "method": "full fine-tuning", "accepted steps": "60", "tokens": "30,180", "TFLOPs": "0.0905",
        "predicted peak MiB": "485.0", "latency ms": "1.25", "merged latency ms": "1.00", "seconds": "6.0",
    }  # fmt: skip
    assert lora_cost["predicted peak MiB"] == "188.0"


def test_without_timing_nothing_in_the_table_moves_with_the_clock():
    slow = [
        run.model_copy(update={"costs": run.costs.model_copy(update={"seconds": 9e9}), "latency": None})
        for run in runs()
    ]
    assert table.results_table(slow, timing=False) == table.results_table(runs(), timing=False)
    assert "seconds" not in table.results_table(runs(), timing=False)
    assert "latency" not in table.results_table(runs(), timing=False)


def test_columns_are_aligned():
    for part in table.results_table(runs(), markdown=True).split("\n\n"):
        assert len({len(line) for line in part.split("\n")}) == 1
    for part in table.results_table(runs()).split("\n\n"):
        assert len({len(line) for line in part.split("\n")}) == 1


def test_what_is_not_recorded_is_a_dash_not_a_zero():
    bare = record(final={}, parameters=None, adapter_bytes=None, latency=None, costs=Costs(steps=5))
    quality, cost = cells(table.results_table([bare], markdown=True))
    assert {
        quality[name] for name in ("test loss", "validation loss", "trainable", "total/trainable", "adapter MiB")
    } == {"-"}
    assert {cost[name] for name in ("predicted peak MiB", "latency ms", "merged latency ms")} == {"-"}


def test_one_seed_has_no_spread_and_diverged_runs_no_score():
    quality, _ = cells(table.results_table([record()], markdown=True))
    assert quality["test accuracy"] == "0.860"
    quality, cost = cells(table.results_table([diverged()], markdown=True))
    assert quality["status"] == "1 diverged" and quality["validation loss"] == cost["tokens"] == "-"


@pytest.mark.parametrize(
    ("loss", "text"), [(0.00004, "0.000"), (99.9994, "99.999"), (1234.56, "1,234.6"), (3e7, "3.00e+07")]
)
def test_digits_are_fixed_whatever_the_size(loss, text):
    quality, _ = cells(table.results_table([record(final={"validation": {"loss": loss}})], markdown=True))
    assert quality["validation loss"] == text


def gap_lines(*gaps: float) -> str:
    records = [record("full", s, final={"test": {"accuracy": 0.5}}) for s in range(len(gaps))]
    records += [record("lora", s, final={"test": {"accuracy": 0.5 + gap}}) for s, gap in enumerate(gaps)]
    return table.gaps(records)


def test_gaps_say_what_is_noise():
    head = "test accuracy: LoRA - full fine-tuning = "
    assert gap_lines(0.1, -0.1, 0.0) == head + "+0.000 [-0.248, +0.248] (3 common seeds, 95 % t interval): within noise"
    assert gap_lines(0.1, 0.11, 0.09).endswith(": above")
    assert gap_lines(0.1) == head + "+0.100 (1 common seed): too few seeds"
    assert gap_lines(*[0.1, 0.2] * 4).endswith("(8 common seeds, 95 % bootstrap interval): above")
    assert gap_lines(math.nan) == "test accuracy: LoRA - full fine-tuning: no seed finished in both"


def test_gaps_name_the_seeds_left_out_and_take_another_baseline():
    assert "left out: seed 3)" in table.gaps(runs())
    assert table.gaps(runs(), "lora").startswith("test accuracy: full fine-tuning - LoRA = +0.010")
    assert table.gaps([record()]) == "One method: nothing to compare it with."
    with pytest.raises(ParameterError, match="baseline='hira'"):
        table.gaps(runs(), "hira")


def test_main_prints_what_it_writes_and_draws(folder, tmp_path, capsys):
    figure, text = tmp_path / "out" / "figure.png", tmp_path / "out" / "table.md"
    assert table.main([str(folder), "--markdown", "--figure", str(figure), "--output", str(text)]) == 0
    printed = capsys.readouterr().out
    assert printed == text.read_text(encoding="utf-8")
    assert table.results_table(runs(), markdown=True) in printed
    assert "\n- test accuracy: LoRA - full fine-tuning = -0.010" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in text.parent.iterdir()) == ["figure.png", "table.md"]


def test_main_keeps_settings_apart(folder, capsys):
    write(record(setting="another"), folder / "another.json")
    assert table.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("another\n") < printed.index("made-up\n")
    with pytest.raises(ParameterError, match="--figure=.*another.*made-up"):
        table.main([str(folder), "--figure", "x.png"])


def test_main_refuses_what_holds_no_record(tmp_path):
    with pytest.raises(DataError, match="no records there"):
        table.main([str(tmp_path)])
    with pytest.raises(DataError, match="missing.json: not a record"):
        table.main([str(tmp_path / "missing.json")])


def test_an_unwritable_figure_leaves_nothing(folder, tmp_path):
    with pytest.raises(ParameterError, match="must end in one of"):
        table.main([str(folder), "--figure", str(tmp_path / "out" / "figure.doc")])
    assert not (tmp_path / "out").exists()
