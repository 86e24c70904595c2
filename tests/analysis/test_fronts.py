"""Which rows no other beats, which are told from the best, and which of them fit a case."""

from __future__ import annotations

import numpy as np
import pytest
from pages import assert_readable
from synthetic_records import MIB, diverged, record

from lorakit.analysis import fronts, stats
from lorakit.errors import ParameterError
from lorakit.records import Costs


def run(row: str, seed: int, accuracy: float, flops: float, mib: float, hours: float = 1.0):
    costs = Costs(flops=flops * 1e12, seconds=3600 * hours, predicted_memory={"peak": round(mib * MIB)})
    return record(row, seed, costs=costs, final={"test": {"accuracy": accuracy}, "validation": {"loss": 1 - accuracy}})


# accuracy, TFLOPs, MiB, hours: "head" is cheap, "lora" between, "full" the best; "skip" is beaten by "lora" in all
ROWS = {"full": (0.90, 30, 300, 3), "lora": (0.85, 20, 100, 2), "head": (0.70, 10, 100, 1), "skip": (0.80, 25, 120, 2)}


def runs(seeds: int = 4, rows=ROWS, spread: float = 0.001):
    return [run(row, seed, told[0] + spread * (seed % 3) * (1 + i), *told[1:])
            for i, (row, told) in enumerate(rows.items()) for seed in range(seeds)]  # fmt: skip


def by_hand(costs, values, higher):
    """Quadratic, from the words of the definition."""
    sign = 1 if higher else -1
    points = list(zip(costs, (sign * value for value in values), strict=True))
    return [not any(c <= a and d >= b and (c < a or d > b) for c, d in points) for a, b in points]


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_what_no_other_point_beats(higher):
    rng = np.random.default_rng(0)
    for count in (1, 2, 20):
        costs, values = rng.integers(0, 6, count), rng.integers(0, 6, count)  # with ties in one and in both
        assert fronts.front(costs, values, higher).tolist() == by_hand(costs, values, higher)


def test_what_has_no_number_is_on_no_front_and_beats_nobody():
    nan, inf = float("nan"), float("inf")
    assert fronts.front([1, nan, 0, inf], [0.5, 0.9, nan, 0.9], True).tolist() == [True, False, False, False]


def test_rows_stand_to_the_best_by_paired_differences():
    table = fronts.standings(runs())
    assert table.index.tolist() == ["full", "lora", "head", "skip"]
    assert table["standing"].tolist() == ["best", "worse", "worse", "worse"]
    assert table.loc["lora", "mean"] == pytest.approx(0.85 + 0.002 * (0 + 1 + 2 + 0) / 4)
    assert table.loc["lora", "low"] < table.loc["lora", "mean"] < table.loc["lora", "high"]
    assert table.loc["skip", ["flops", "predicted_peak", "seconds"]].tolist() == [25e12, 120 * MIB, 7200]
    near = runs(rows=ROWS | {"lora": (0.8985, 20, 100, 2)})
    assert fronts.standings(near).loc["lora", "standing"] == "within noise"
    losses = fronts.standings(runs(), "validation loss")
    assert losses["standing"].tolist() == ["best", "worse", "worse", "worse"]  # of a loss the least


def test_few_seeds_have_no_interval_and_cannot_be_told_apart():
    table = fronts.standings(runs(seeds=2))
    assert table["standing"].tolist() == ["best", *["too few seeds"] * 3] and table["low"].isna().all()
    assert "cannot say which is best: too few seeds" in str(fronts.which(runs(seeds=1)))
    said = fronts.standings_table(runs(seeds=1))
    assert said["test accuracy"].tolist() == ["0.900", "0.850", "0.800", "0.700"]  # no interval


def test_the_table_begins_with_the_best_and_marks_who_is_on_which_front():
    table = fronts.standings_table([*runs(), diverged("hira", 0)])
    assert table.index.tolist() == ["full", "lora", "skip", "head"]  # who never finished is not judged
    assert table["TFLOPs"].tolist() == ["30 *", "20 *", "25", "10 *"]
    assert table["predicted peak MiB"].tolist() == ["300.0 *", "100.0 *", "120.0", "100.0"]
    assert table.loc["head", "test accuracy"].startswith("0.702 [0.698")


@pytest.mark.parametrize(
    ("limits", "rows", "said"),
    [({}, ["full"], "no limit: 1 of 4"), ({"mib": 120}, ["lora"], "120 MiB: 1 of 3 rows"),
     ({"mib": 120, "hours": 1}, ["head"], "120 MiB and 1 h: 1 of 1"), ({"hours": 2.5}, ["lora"], "2.5 h: 1 of 3")],
)  # fmt: skip
def test_the_rows_that_fit_and_are_not_told_from_the_best_of_them(limits, rows, said):
    answer = fronts.which(runs(), **limits)
    assert str(answer).startswith(said) and answer.parts[1].index.tolist() == rows


def test_what_fits_nowhere_is_said_with_the_least_that_would():
    assert (
        str(fronts.which(runs(), mib=99)) == "99 MiB: no row fits; the smallest peak is 100 MiB, the shortest run 1 h."
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda r: fronts.which(r, mib=0), "^mib=0: must be positive"),
     (lambda r: fronts.which(r, hours=float("nan")), "^hours=nan: must be positive"),
     (lambda r: fronts.standings(r, "test grace"), "^value='test grace': must be a split and one of f1"),
     (lambda r: fronts.standings(r, "f1"), "^value='test f1': is in no finished run"),
     (lambda r: fronts.standings([]), "^records=.*at least one"),
     (lambda r: fronts.tradeoff(r, ["colour"]), r"^costs=\['colour'\]: must be among flops, predicted_peak")],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ParameterError, match=message):
        call(runs())


def test_the_figure_shows_every_mean_and_the_front():
    drawn = fronts.tradeoff(runs())
    assert_readable(drawn)
    flops, peak = drawn.axes
    assert flops.get_xlabel() == "TFLOPs, mean over seeds" and flops.get_ylabel() == "test accuracy"
    steps = [line for line in flops.lines if line.get_color() == "0.55"]
    means = fronts.standings(runs())["mean"]
    np.testing.assert_allclose(steps[0].get_xydata(), [[10, means["head"]], [20, means["lora"]], [30, means["full"]]])
    shown = {tuple(np.round(line.get_xydata()[0], 6)) for line in peak.lines if len(line.get_xdata()) == 1}
    assert {(x, round(means[row], 6)) for row, (_, _, x, _) in ROWS.items()} <= shown
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels[:4] == ["full fine-tuning", "LoRA", "head only", "SkipLoRA"]


def test_a_row_that_lacks_a_cost_is_not_drawn_beside_it():
    some = [record("lora", s, costs=Costs(flops=1e12)) for s in range(3)]
    drawn = fronts.tradeoff([*some, *runs(seeds=3, rows={"full": ROWS["full"]})])
    assert fronts.standings_table(some)["predicted peak MiB"].tolist() == ["-"]
    flops, peak = ({line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1} for ax in drawn.axes)
    assert flops == {1.0, 30.0} and peak == {300.0}
    assert str(fronts.which(some, mib=9)).startswith("9 MiB: no row fits; no peak is recorded, the shortest run ")


def test_equal_rows_are_rarely_told_apart_however_many_there_are():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(20):
        shared = rng.normal(0, 0.01, 5)
        records = [run(f"row{i}", seed, 0.8 + shared[seed] + rng.normal(0, 0.01), 1, 1)
                   for i in range(8) for seed in range(5)]  # fmt: skip
        wrong += (fronts.standings(records)["standing"] == "worse").any()
    assert wrong <= 5  # uncorrected intervals call some row worse in 14 of these 20


def test_the_best_has_the_most_seeds_and_others_may_be_better_where_both_ran():
    lucky = [*runs(seeds=4), run("hira", 0, 0.99, 1, 1)]
    table = fronts.standings(lucky)
    assert table.loc["full", "standing"] == "best" and table.loc["hira", "standing"] == "too few seeds"
    halves = [run("full", seed, 0.5 if seed < 4 else 0.99, 1, 1) for seed in range(8)]
    halves += [run("lora", seed, 0.6 + 0.001 * seed, 1, 1) for seed in range(4)]
    table = fronts.standings(halves)
    assert table["standing"].tolist() == ["best", "better"] and table["common"].tolist() == [8, 4]
    assert "Better on common seeds: LoRA." in fronts.verdict(halves)
    same = [run(row, seed, 0.5, 1, 1) for row in ("full", "lora") for seed in range(3)]
    assert fronts.standings(same)["standing"].tolist() == ["best", "within noise"]


def test_the_verdict_says_what_one_seed_cannot_and_what_needs_none():
    one = fronts.verdict(runs(seeds=1)).split("\n")
    assert one[:2] == [
        "full fine-tuning has the best test accuracy, 0.900.",
        "LoRA; head only; SkipLoRA: 1 common seed cannot say whether they are worse (3 give an interval).",
    ]
    said = "Times LoRA's {}, which seeds hardly change: head only {}; SkipLoRA {}; full fine-tuning {}."
    assert one[2] == said.format("compute", "0.50", "1.25", "1.50")
    assert one[3] == said.format("predicted peak memory", "1.00", "1.20", "3.00")
    several = fronts.verdict(runs(rows=ROWS | {"lora": (0.8985, 20, 100, 2)})).split("\n")
    assert several[1:3] == ["Worse beyond noise: head only; SkipLoRA.", "Within its noise: LoRA."]
    assert len(fronts.verdict(runs(rows={"head": ROWS["head"]})).split("\n")) == 1


def test_perplexities_are_compared_by_their_logarithms():
    """Where one row's are ten times the other's, but spread so far that their difference tells nothing."""
    found = {"lora": [5.0, 6.0, 5.5, 6.5], "head": [20.0, 400.0, 60.0, 70.0]}
    records = [
        run(row, seed, 0.5, 1, 1).model_copy(update={"final": {"test": {"perplexity": value, "loss": np.log(value)}}})
        for row, values in found.items()
        for seed, value in enumerate(values)
    ]
    table = fronts.standings(records)
    assert table["standing"].tolist() == ["best", "worse"] and table.loc["head", "mean"] == np.mean(found["head"])
    assert min(stats.below(np.subtract(found["head"], found["lora"]), 0)) > 0.1
