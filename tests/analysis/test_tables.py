"""A table says what the records say, in fixed digits, and `lorakit table` leaves nothing half-done."""

from __future__ import annotations

import math
import re
import statistics

import pandas as pd
import pytest
from synthetic_records import diverged, record, search

from lorakit.analysis import tables
from lorakit.errors import DataError, ParameterError
from lorakit.records import Costs, write


def runs():
    finished = [record(m, s, floor=0.3 + 0.1 * i) for i, m in enumerate(("full", "lora")) for s in range(3)]
    return [*finished, diverged("lora", 3)]


def lines(records, **options) -> list[dict[str, str]]:
    """Lines of what each row bought, then of what each cost, as heading -> cell."""
    return [line for part in tables.results_table(records, **options).parts for line in part.to_dict("records")]


@pytest.fixture
def folder(tmp_path):
    for run in runs():
        write(run, tmp_path / "results" / run.method / f"s{run.seed}.json")
    write(search("lora"), tmp_path / "results" / "lora" / "search.json")
    return tmp_path / "results"


def test_cells_are_the_records():
    full, lora, full_cost, lora_cost = lines(runs())
    assert full == {
        "method": "full fine-tuning", "seeds": "3", "status": "3 done",
        "test accuracy": "0.860 ± 0.010", "validation loss": "0.325 ± 0.010",
        "trainable": "1,000", "total/trainable": "64.0", "adapter MiB": "1.50",
    }  # fmt: skip
    assert (lora["seeds"], lora["status"], lora["test accuracy"]) == ("4", "3 done, 1 diverged", "0.850 ± 0.010")
    assert full_cost == {
        "method": "full fine-tuning", "accepted steps": "60", "tokens": "30,180", "TFLOPs": "0.0905",
        "predicted peak MiB": "485.0",
    }  # fmt: skip
    assert lora_cost["predicted peak MiB"] == "188.0"


def test_nothing_in_the_table_moves_with_the_clock():
    slow = runs()
    for run in slow:
        run.costs.seconds, run.latency = 9e9, None
    one, other = (tables.results_table(records) for records in (slow, runs()))
    assert str(one) == str(other) and one._repr_html_() == other._repr_html_()
    assert "seconds" not in str(one) and "latency" not in str(one)


def test_a_terminal_sees_aligned_text_a_file_markdown_and_jupyter_html():
    shown = tables.results_table([*runs(), record("<b>", 0)])
    for layout in (str(shown), shown.markdown()):
        for part in layout.split("\n\n"):
            assert len({len(line) for line in part.split("\n")}) == 1
    assert repr(shown) == str(shown) and "0.860 ± 0.010" in str(shown)
    head, rule, *rest = shown.markdown().split("\n\n")[0].split("\n")
    assert head.startswith("| method") and rule.startswith("|:--") and rule.endswith("--:|") and len(rest) == 3
    html = shown._repr_html_()
    assert html.count("<table") == 2 and "0.860 ± 0.010" in html and "&lt;b&gt;" in html and "<b>" not in html
    bold = tables.Table(pd.DataFrame({"verdict": ["**holds** *"]}), "it **holds**, or <is> not")._repr_html_()
    assert bold.count("<b>holds</b>") == 2 and "&lt;is&gt;" in bold and "<b>holds</b> *" in bold


def test_what_is_not_recorded_is_a_dash_not_a_zero():
    bare = record(final={}, parameters=None, adapter_bytes=None, latency=None, costs=Costs(steps=5))
    quality, cost = lines([bare])
    asked = ("test loss", "validation loss", "trainable", "total/trainable", "adapter MiB")
    assert {quality[name] for name in asked} == {"-"}
    assert cost["predicted peak MiB"] == "-"


def test_one_seed_has_no_spread_and_diverged_runs_no_score():
    assert lines([record()])[0]["test accuracy"] == "0.860"
    quality, cost = lines([diverged()])
    assert quality["status"] == "1 diverged" and quality["validation loss"] == cost["tokens"] == "-"
    infinite = record(seed=1, final={"validation": {"loss": math.inf}})
    alone = lines([record()])[0]["validation loss"]
    assert lines([record(), infinite])[0]["validation loss"] == f"{alone} (1 of 2)"


@pytest.mark.parametrize(
    ("loss", "text"), [(0.00004, "0.000"), (99.9994, "99.999"), (1234.56, "1,234.6"), (3e7, "3.00e+07")]
)
def test_digits_are_fixed_whatever_the_size(loss, text):
    assert lines([record(final={"validation": {"loss": loss}})])[0]["validation loss"] == text


def test_a_row_says_where_it_departs_from_the_reference_and_whether_its_rate_was_searched():
    asked = {"differs": {"dtype": "full fine-tuning in half precision diverges"}, "learning_rate_from": ""}
    said = tables.results_table([record("lora"), record("full", resolved=asked)]).parts[-1].split("\n")
    why = "full fine-tuning: dtype differs: full fine-tuning in half precision diverges"
    assert said == [why, "full fine-tuning: rate not searched"]
    assert lines([record("mine", resolved={"label": "My own"})])[0]["method"] == "My own"
    searched = record(resolved={"learning_rate_from": "results/toy/lora/lr_search.json", "differs": {}})
    assert len(tables.results_table([searched]).parts) == 2
    assert tables.results_table([record(notes=["rate not searched"])]).parts[-1] == "LoRA: rate not searched"


def gap_of(*gaps: float) -> tuple[str, ...]:
    records = [record("full", s, final={"test": {"accuracy": 0.5}}) for s in range(len(gaps))]
    records += [record("lora", s, final={"test": {"accuracy": 0.5 + gap}}) for s, gap in enumerate(gaps)]
    ((line,),) = (part.to_dict("records") for part in tables.gaps(records).parts)
    assert (line["row"], line["against"], line["value"]) == ("LoRA", "full fine-tuning", "test accuracy")
    return tuple(line[name] for name in ("difference", "95 % interval", "pairs", "verdict"))


def test_a_score_that_a_finished_run_lacks_says_of_how_many_it_is():
    """NaN in a finished record: the mean of the others is theirs alone."""
    runs = [record("lora", seed) for seed in (0, 1, 2)]
    runs[2].final["test"]["accuracy"] = math.nan
    [quality, _] = [part for part in tables.results_table(runs).parts if not isinstance(part, str)][:2]
    losses = [run.final["test"]["accuracy"] for run in runs[:2]]
    spread = statistics.stdev(losses)
    assert quality["test accuracy"][0] == f"{statistics.fmean(losses):.3f} ± {spread:.3f} (2 of 3)"
    assert "of" not in quality["validation loss"][0] and quality["seeds"][0] == "3"


@pytest.mark.parametrize("name", ["a|b", "a\nb", "a | b\n\nc"])
def test_no_row_s_name_breaks_a_table(name):
    """Read back as Markdown's cells: bars that are not escaped part them, lines end them."""
    made = tables.results_table([record("lora"), record(name), record("full", resolved={"label": name})])
    blocks = [block for block in made.markdown().split("\n\n") if block.startswith("|")]
    assert [len(block.splitlines()) for block in blocks] == [5, 5]
    for block in blocks:
        cells = [re.split(r"(?<!\\)\|", line) for line in block.splitlines()]
        assert len({len(line) for line in cells}) == 1
        assert [line[1].strip().replace("\\|", "|") for line in cells[2:]].count(" ".join(name.split())) == 2


@pytest.mark.parametrize(("share", "text"), [(0.225, "22.5 %"), (0.3, "30 %"), (1, "100 %"), (0.0333, "3.33 %")])
def test_percents_have_three_digits(share, text):
    assert tables.percent(share) == text


def test_gaps_say_what_is_noise():
    assert gap_of(0.1, -0.1, 0.0) == ("+0.000", "[-0.248, +0.248]", "3", "within noise")
    assert gap_of(0.1, 0.11, 0.09)[-1] == "above"
    assert gap_of(0.1) == ("+0.100", "-", "1", "too few seeds")
    assert gap_of(*[0.1, 0.2] * 4)[2:] == ("8", "above")
    assert gap_of(math.nan) == ("-", "-", "0 (without seed 0)", "not comparable")


def test_gaps_name_the_seeds_left_out_and_take_another_baseline():
    assert "3 (without seed 3)" in str(tables.gaps(runs()))
    (line,) = tables.gaps(runs(), "lora").parts[0].to_dict("records")
    assert (line["row"], line["against"], line["difference"]) == ("full fine-tuning", "LoRA", "+0.010")
    assert str(tables.gaps([record()])) == "One row: nothing to compare it with."
    with pytest.raises(ParameterError, match="baseline='hira'"):
        tables.gaps(runs(), "hira")


def test_a_sentence_says_what_a_row_bought_and_cost_or_why_it_cannot():
    assert tables.sentence(runs(), "lora", "full") == (
        "LoRA against full fine-tuning on made-up, 3 seeds: test accuracy 0.850 against 0.860 (below), validation loss "
        "0.425 against 0.325 (above); trained parameters × 1, FLOPs × 0.667, predicted peak memory × 0.388."
    )
    one = [record("lora", 0), diverged("full", 0)]
    assert tables.sentence(one, "hira", "full") == "made-up: no run of HiRA here to compare."
    assert tables.sentence(one, "lora", "full").endswith("have no seed that finished in both.")
    seed = tables.sentence([record("lora", 0), record("full", 0), record("full", 1)], "lora", "full")
    assert "made-up, 1 seed: " in seed and "too few seeds" in seed
    blind = {"validation": {"loss": 9.0}, "test": {"loss": 9.0}}  # its accuracy was not taken
    every = [run for run in runs() if (run.row, run.seed) != ("lora", 2)]
    third = tables.sentence([*every, record("lora", 2, final=blind)], "lora", "full")
    assert "made-up, 2 seeds: " in third and "validation loss 3.280 against 0.325 (within noise)" in third
    mixed = [record("lora", 0, resolved={"model": "m"}), record("full", 0, resolved={"model": "n"})]
    with pytest.raises(ParameterError, match="must be of one model"):
        tables.sentence(mixed, "lora", "full")


def test_main_prints_what_it_writes_and_draws(folder, tmp_path, capsys):
    figure, text = tmp_path / "out" / "figure.png", tmp_path / "out" / "table.md"
    assert tables.main([str(folder), "--markdown", "--figure", str(figure), "--output", str(text)]) == 0
    printed = capsys.readouterr().out
    assert printed == text.read_text(encoding="utf-8")
    assert tables.results_table(runs()).markdown() in printed and tables.gaps(runs()).markdown() in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in text.parent.iterdir()) == ["figure.png", "table.md"]


def test_main_keeps_settings_apart(folder, capsys):
    write(record(setting="another"), folder / "another.json")
    assert tables.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("another\n") < printed.index("made-up\n")
    with pytest.raises(ParameterError, match="--figure=.*another.*made-up"):
        tables.main([str(folder), "--figure", "x.png"])


def test_another_model_in_the_table_is_refused_unless_the_reader_insists(folder, capsys):
    write(record("head", resolved={"model": "a"}), folder / "head.json")
    write(record("head", 1, resolved={"model": "b"}), folder / "head1.json")
    with pytest.raises(ParameterError, match="head seed 0: a; head seed 1: b.*must be of one model.*--mixed"):
        tables.main([str(folder)])
    assert tables.main([str(folder), "--mixed"]) == 0
    assert "not comparable: model differ" in capsys.readouterr().out


def test_main_refuses_what_holds_no_record(tmp_path):
    with pytest.raises(DataError, match="no records there"):
        tables.main([str(tmp_path)])
    with pytest.raises(DataError, match="missing.json: not a record"):
        tables.main([str(tmp_path / "missing.json")])


def test_an_unwritable_figure_leaves_nothing(folder, tmp_path):
    with pytest.raises(ParameterError, match="must end in one of"):
        tables.main([str(folder), "--figure", str(tmp_path / "out" / "figure.doc")])
    assert not (tmp_path / "out").exists()
