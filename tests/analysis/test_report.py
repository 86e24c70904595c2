"""A report says what can be worked out by hand from the records, marks what is not fair, and hides no run."""

from __future__ import annotations

import math
import os
from textwrap import dedent

import pytest
from synthetic_records import diverged, gated, record

from lorakit import cli, style
from lorakit.analysis import equal_cost, frame, report, stats
from lorakit.errors import DataError, ParameterError
from lorakit.records import write

FULL = 353  # candidates seen by 120 accepted at rate 0.3, burn-in 20
ROWS = {  # row -> acceptance rate, accepted steps
    "baseline": (1, 120), "full_length": (1, FULL), "same_flops": (1, 236), "random": (0.3, 120), "slora": (0.3, 120),
    "loss_floor": (0.3, 120), "random50": (0.5, 200), "slora50": (0.5, 200),
}  # fmt: skip


def runs(*rows: str, seeds=range(3), **floors: float):
    named = [(row, seed) for row in rows or ROWS for seed in seeds]
    return [gated(r, s, rate=ROWS[r][0], accepted=ROWS[r][1], floor=floors.get(r, 0.4)) for r, s in named]


def final(row: str, losses: dict[int, float], accepted: int = 70):
    given = {"rate": ROWS[row][0], "accepted": accepted}
    return [gated(row, seed, final={"validation": {"loss": loss}}, **given) for seed, loss in losses.items()]


def pairs_of(records, axis: str, baseline: str = "") -> dict[tuple[str, str], stats.Comparison]:
    found = equal_cost.comparisons(equal_cost.rows_of(records, baseline), axis)
    assert len({(one.gap.method, one.gap.baseline) for one in found}) == len(found)
    return {(one.gap.method, one.gap.baseline): one for one in found}


def cells(table) -> list[dict[str, str]]:
    """Lines of a table, or of one in Markdown."""
    if not isinstance(table, str):
        return table.to_dict("records")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def section(text: str, title: str) -> str:
    return text.split(f"# {title}")[1].split("\n#")[0]


# rows


def test_the_baseline_comes_first_then_ungated_random_and_slora():
    assert list(equal_cost.rows_of(runs())) == [*ROWS]
    assert list(equal_cost.rows_of(runs(), "slora"))[:2] == ["slora", "baseline"]
    assert next(iter(equal_cost.rows_of([record("full"), record("lora"), record("head")]))) == "lora"
    assert next(iter(equal_cost.rows_of([record("full"), record("head")]))) == "full"


def test_random_is_the_one_at_the_same_rate():
    groups = equal_cost.rows_of(runs())
    found = {row: equal_cost.random_for(groups, row) for row in groups}
    assert {row: other for row, other in found.items() if other not in (None, row)} == {
        "slora": "random", "loss_floor": "random", "slora50": "random50"
    }  # fmt: skip
    for run in groups["slora50"]:
        run.details = {}  # a run that was cut short: the rate is among its parameters
    assert equal_cost.random_for(groups, "slora50") == "random50"


def test_missing_random_is_said():
    records = runs("baseline", "random", "slora", "slora50")
    assert ("slora50", "random") not in pairs_of(records, "tokens")
    assert "No random row at the same rate: SLoRA (50 %) (at 50 %)." in report.report(records)
    assert "No random row" not in report.report(runs())


def test_chosen_tokens_are_compared_with_random_tokens_of_the_same_share_and_mode():
    def row(name, method="flora", share=0.2, mode="gather"):
        chosen = {"gating": {"method": method, "topk_tokens": share, "mode": mode}}
        return [record(name, seed, details={"tokens": chosen}) for seed in range(3)]

    rows = [row("r20", "random"), row("r20f", "random", mode="fractional"), row("f20"), row("f40", share=0.4)]
    records = [*(record("lora", seed) for seed in range(3)), *sum(rows, []), *row("f20f", mode="fractional")]
    groups = equal_cost.rows_of(records)
    found = {name: equal_cost.random_for(groups, name) for name in groups}
    assert {name: other for name, other in found.items() if other not in (None, name)} == {"f20": "r20", "f20f": "r20f"}
    written = report.report(records)
    assert "The criterion" not in written and "No random row at the same rate: f40 (at 40 %)." in written
    assert "The criterion" in report.report(runs())


def test_a_gate_of_examples_is_held_against_rows_of_whole_steps_not_against_batches():
    """Random examples are an ungated run; a run that ended before its gate was made is asked for the same rate."""
    asked = {"gate": "loss_floor", "gate_level": "example", "gate_candidates": 4, "gate_rate": 0.3}
    report_of = {"gate": {"name": "loss_floor", "level": "example", "candidates": 4, "acceptance_rate": 0.25}}
    best = [record("best", seed, setting="made-up-gates", resolved=asked, details=report_of) for seed in (1, 2, 3)]
    lost = record("best", 0, setting="made-up-gates", resolved=asked, status="out_of_memory", curve=[])
    ungated = [gated("baseline", seed, rate=1) for seed in range(3)]
    batches = [gated(name, seed, rate=0.25) for name in ("random", "loss_floor") for seed in range(3)]
    groups = equal_cost.rows_of([*ungated, *batches, lost, *best])
    found = {name: equal_cost.random_for(groups, name) for name in groups}
    assert found == {"baseline": None, "random": "random", "loss_floor": "random", "best": "baseline"}
    assert frame.gate_of(groups["best"]) == ("loss_floor example", 0.25) == frame.gate_of([lost])
    text = report.report([*ungated, lost, *best])
    assert "No random row" not in text and "The criterion" not in text
    assert "Where a gate chooses examples" in section(text, "What it cost")
    assert "Where a gate chooses examples" not in report.report(runs())


def test_a_rows_own_label_is_in_every_table():
    own = [gated("slora", seed, resolved={"gate": "novelty", "gate_rate": 0.2, "label": "mine"}) for seed in range(3)]
    text = report.report([*runs("baseline", "full_length"), *own])
    assert "SLoRA" not in text and text.count("| mine ") >= 6


# at equal cost


def test_a_difference_and_its_interval_are_those_worked_out_by_hand():
    records = runs("baseline", "random")
    records += [gated("slora", seed, floor=0.4 + gap) for seed, gap in enumerate((-0.01, -0.02, 0.0))]
    one = pairs_of(records, "accepted_steps")["slora", "random"]
    assert one.gap.differences == pytest.approx((-0.01, -0.02, 0.0)) and one.places == {0: 120, 1: 120, 2: 120}
    half = 4.302652730 * 0.01 / math.sqrt(3)
    assert (one.gap.estimate.low, one.gap.estimate.high) == pytest.approx((-0.01 - half, -0.01 + half))
    (row,) = cells(report.equal_table([one]))
    assert row == {
        "row": "SLoRA", "against": "random batches", "at accepted steps": "120", "difference": "-0.0100",
        "95 % interval": "[-0.0348, +0.0148]", "pairs": "3", "decayed": "yes", "verdict": "within noise",
    }  # fmt: skip


def test_below_means_a_lower_loss():
    for floor, verdict in ((0.39, "below"), (0.41, "above")):
        found = pairs_of(runs(slora=floor), "accepted_steps")
        assert {found["slora", other].gap.verdict for other in ("baseline", "random")} == {verdict}


def test_the_run_that_goes_on_is_interpolated_and_the_pair_marked():
    found = pairs_of(runs(), "accepted_steps")
    one = found["full_length", "baseline"]  # evaluated at 88 and 176, compared at 120
    at = {n: 0.4 + 0.3 * math.exp(-n / 40) for n in (88, 120, 176)}
    expected = at[88] + (at[176] - at[88]) * (120 - 88) / (176 - 88) - at[120]
    assert one.gap.differences == pytest.approx([expected] * 3)
    assert one.shares == {"full_length": pytest.approx(120 / FULL), "baseline": 1.0} and not one.fair
    (row,) = cells(report.equal_table([one]))
    assert row["verdict"] == "above †" and row["decayed"] == "no: LoRA, full length at 33 %"


def test_an_unfinished_baseline_brings_in_the_ungated_row_that_fits():
    tokens = pairs_of(runs(), "tokens")  # the gate sees as many candidates as the full-length run
    assert not tokens["slora", "baseline"].fair and tokens["slora", "full_length"].fair
    assert tokens["slora", "full_length"].places[0] == 100 * FULL
    flops = pairs_of(runs(), "flops")
    assert flops["slora", "same_flops"].fair and ("slora", "full_length") not in flops
    steps = pairs_of(runs(), "accepted_steps")
    assert steps["slora", "baseline"].fair and ("slora", "full_length") not in steps
    assert ("full_length", "same_flops") not in tokens  # ungated rows have only the one baseline


def test_a_run_counts_as_finished_from_95_percent_on():
    for accepted, fair in ((126, True), (127, False)):
        records = [gated(r, s, rate=1, accepted=n) for r, n in (("baseline", 120), ("lora", accepted)) for s in (0, 1)]
        assert pairs_of(records, "accepted_steps")["lora", "baseline"].fair is fair


def test_a_constant_learning_rate_has_no_end_to_be_at():
    records = runs("baseline", "full_length")
    for run in records:
        run.resolved["schedule"] = "constant"
    one = pairs_of(records, "accepted_steps")["full_length", "baseline"]
    assert one.fair and cells(report.equal_table([one]))[0]["decayed"] == "constant rate"


def test_pairs_share_a_seed_and_the_others_are_named():
    records = runs("baseline", seeds=(0, 1, 2)) + runs("slora", seeds=(4, 2, 1), slora=0.45)
    one = pairs_of(records, "accepted_steps")["slora", "baseline"]
    assert one.gap.seeds == (1, 2) and one.gap.differences == pytest.approx((0.05, 0.05))
    (row,) = cells(report.equal_table([one]))
    assert (row["pairs"], row["95 % interval"], row["verdict"]) == ("2 (without seed 0, 4)", "-", "too few seeds")


def test_pairs_that_end_at_different_x_say_the_range():
    records = [gated("baseline", s, rate=1) for s in range(3)]
    records += [gated("slora", s, accepted=(100, 110, 120)[s]) for s in range(3)]
    one = pairs_of(records, "accepted_steps")["slora", "baseline"]
    assert one.places == {0: 100, 1: 110, 2: 120} and not one.fair
    assert cells(report.equal_table([one]))[0]["at accepted steps"] == "100 to 120"


def test_rows_without_a_common_seed_are_a_dash():
    one = pairs_of(runs("baseline", seeds=[0]) + runs("slora", seeds=[1]), "tokens")["slora", "baseline"]
    (row,) = cells(report.equal_table([one]))
    assert {row[name] for name in ("at tokens", "difference", "95 % interval", "decayed")} == {"-"}
    assert row["verdict"] == "not comparable" and row["pairs"] == "0 (without seed 0, 1)"


# the criterion


@pytest.mark.parametrize(
    ("losses", "accepted", "verdict", "reason"),
    [((1.005, 1.005, 1.005), 70, "passed", ""),  # both limits are inside
     ((0.99, 0.991, 0.989), 70, "passed", ""), ((1.0051, 1.0051, 1.0051), 70, "failed", "loss too high"),
     ((1.000, 1.006, 1.004), 70, "undecided", "interval holds the limit"),
     ((0.9, 0.9, 0.9), 71, "failed", "too many steps"), ((0.9, 0.9), 70, "undecided", "too few seeds")],
)  # fmt: skip
def test_the_criterion(losses, accepted, verdict, reason):
    reference = final("full_length", dict.fromkeys(range(3), 1.0), accepted=100)
    found = equal_cost.criterion(final("slora", dict(enumerate(losses)), accepted), reference)
    assert (found.verdict, found.reason) == (verdict, reason)
    assert found.saved == pytest.approx(1 - accepted / 100)


def test_the_criterion_is_relative_paired_and_shown_with_its_interval():
    reference = final("full_length", {0: 2.0, 1: 1.0, 2: 0.5}, accepted=100)
    slora = final("slora", {2: 0.505, 1: 1.02, 0: 2.0})
    assert equal_cost.criterion(slora, reference).gap.differences == pytest.approx((0.0, 0.02, 0.01))
    written = section(report.report([*reference, *slora]), "The criterion")
    (row,) = cells(written.strip().split("\n\n")[-1])
    assert row["validation loss, relative"] == "+1.00%" and row["95 % interval"] == "[-1.48%, +3.48%]"
    assert row["fewer accepted steps"] == "30.0 %" and row["verdict"] == "**undecided** (interval holds the limit)"


def test_the_least_saving_of_the_pairs_counts():
    reference = final("full_length", dict.fromkeys(range(3), 1.0), accepted=100)
    row = final("slora", {0: 0.9, 1: 0.9}, accepted=30) + final("slora", {2: 0.9}, accepted=80)
    assert equal_cost.criterion(row, reference).verdict == "failed"


def test_the_criterion_is_about_the_full_length_row():
    assert "(`full_length`)" in section(report.report(runs()), "The criterion")
    assert "The criterion" not in report.report(runs("baseline", "slora"))  # whose steps are equal by construction
    unfinished = equal_cost.criterion([diverged("slora")], [record("full")])
    assert (unfinished.verdict, unfinished.reason) == ("undecided", "no seed finished in both")


# the whole


def test_tables_are_the_records():
    text = report.report(runs(slora=0.38))
    quality, cost = (cells(section(text, title).strip().split("\n\n")[-1])[4] for title in
                     ("What each row reached", "What it cost"))  # fmt: skip
    assert quality == {
        "method": "SLoRA", "row": "`slora`", "seeds": "0, 1, 2", "runs": "3 done", "learning rate": "0.001",
        "validation loss": "0.405 ± 0.010", "validation accuracy": "0.595 ± 0.010", "test accuracy": "0.495 ± 0.010",
    }  # fmt: skip
    assert cost == {
        "method": "SLoRA", "accepted steps": "120", "steps": "353", "tokens": "35,300", "TFLOPs": "4.73",
        "seconds": "473.0", "accepted": "34 %", "after burn-in": "30.0 %", "target": "30 %",
    }  # fmt: skip


def test_the_header_says_what_rows_share_and_where_they_differ():
    records = runs("baseline", "random", "slora")
    for run in records:
        run.environment = {"cpu": "a cpu", "device": "cpu", "versions": {"torch": "2.13.0", "bitsandbytes": None}}
        run.fingerprints = {"data": {"train.tsv": "0123456789abcdef"}, "model": "fedcba9876543210", "code": "c" * 64}
    records[-1].resolved["learning_rate"] = 3e-3
    records[-1].environment = {"cpu": "another", "device": "cpu"}
    lines = report.report(records, sources=["results/here"]).split("\n")
    expected = f"""
        - Read: 9 records under `results/here`
        - Model: a-model (fedcba987654)
        - Data: sst2: train.tsv (0123456789ab)
        - Seeds: 0, 1, 2
        - Learning rate: 0.001; but `slora` 0.001, 0.003
        - Budget: 120 accepted steps
        - Versions: torch 2.13.0
        - Machine: a cpu, cpu; another, cpu (seconds are not comparable)
        - Code: {"c" * 12}"""
    assert set(dedent(expected).strip().split("\n")) <= set(lines)


def test_no_run_is_dropped_in_silence():
    records = [*runs(), gated("slora", 3, status="interrupted", message="stopped at\nstep 60", final={})]
    records[-2].details["gate"]["warnings"] = ["acceptance is stuck at 0 %"]
    for run in records:
        run.notes = ["a small data set"]
    text = report.report(records)
    unfinished = "- `slora` seed 3: interrupted after step 353: stopped at step 60"
    assert section(text, "Runs that did not finish").strip() == unfinished
    assert section(text, "Warnings of the gates").strip() == "- `slora50` seed 2: acceptance is stuck at 0 %"
    assert section(text, "Notes of the runs").strip() == "- all runs: a small data set"
    assert "3 (without seed 3)" in text and "3 done, 1 interrupted" in text
    assert section(report.report(runs()), "Runs that did not finish").strip() == "None."


def test_only_unfinished_runs_still_make_a_report():
    text = report.report([diverged("lora", 0), diverged("head", 0)])
    assert "1 diverged" in text and "- all runs: diverged after step 40: train loss is NaN" in text


def test_one_row_has_nothing_to_be_compared_with_and_interpolation_is_told():
    text = report.report([record("lora")])
    assert "One row: nothing to compare it with." in text and "criterion" not in text
    assert "(4 times a run); in between it is interpolated" in report.report(runs())


# the command


@pytest.fixture
def folder(tmp_path):
    for run in runs("baseline", "random", "slora"):
        write(run, tmp_path / "results" / run.method / f"s{run.seed}.json")
    return tmp_path / "results"


def test_main_writes_the_report_and_the_figures_it_refers_to(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(style, "PRINT_DPI", 30)
    output, pictures = tmp_path / "out" / "report.md", tmp_path / "out" / "pictures"
    assert report.main([str(folder), "--output", str(output), "--figures", str(pictures)]) == 0
    text = output.read_text(encoding="utf-8")
    assert text.startswith("# made-up-gates: 3 rows compared\n")
    named = [line.partition("](")[2].rstrip(")") for line in text.split("\n") if line.startswith("![")]
    drawn = [f"loss_by_{axis}" for axis in ("accepted_steps", "tokens", "flops", "seconds")]
    assert named == [f"pictures/{name}.png" for name in (*drawn, "acceptance", "novelty", "ledger")]
    assert all((output.parent / name).read_bytes().startswith(b"\x89PNG") for name in named)
    assert sorted(path.name for path in output.parent.iterdir()) == ["pictures", "report.md"]
    assert capsys.readouterr().out == f"{output}: 9 runs of 3 rows\n"


def test_main_takes_another_baseline_and_replaces_an_old_report(folder, tmp_path):
    output = tmp_path / "report.md"
    output.write_text("old")
    assert report.main([str(folder), "--output", str(output), "--baseline", "random"]) == 0
    assert "The baseline is `random`." in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("{results} --baseline sloar", "--baseline='sloar': must be one of baseline, random, slora"),
     ("{results} {other}", "records=.*must be of one setting"), ("{results} {results}", "one record per row and seed"),
     ("{empty}", "no records there"), ("{empty}/missing.json", "not a record"),
     ("{results} --figures {file}", "--figures=.*is not a folder")],
)  # fmt: skip
def test_bad_input_is_one_error_and_writes_nothing(arguments, message, folder, tmp_path):
    places = {name: tmp_path / name for name in ("other", "empty", "file")} | {"results": folder}
    write(gated("slora", setting="another"), places["other"] / "s0.json")
    places["empty"].mkdir()
    places["file"].write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ParameterError, DataError), match=message):
        report.main(
            [*(text.format(**places) for text in arguments.split()), "--output", str(tmp_path / "out" / "report.md")]
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_cannot_be_written_is_one_line(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "report.md", tmp_path):
        figures = tmp_path / "figures"
        assert cli.main(["report", str(folder), "--output", str(place), "--figures", str(figures)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("lorakit report: --output=") and "\n" not in error and not figures.exists()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ParameterError, match="No space left"):
        report.main([str(folder), "--output", str(tmp_path / "report.md")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "results"]
