"""Statistics against scipy, formulas by hand and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from synthetic_records import diverged, record

from lorakit.analysis import stats
from lorakit.errors import ParameterError

SAMPLE = [0.3, -0.1, 0.25, 0.7, 0.05, 0.4, -0.2, 0.9]


def final(method: str, seed: int, loss: float, **changes):
    return record(method, seed, final={"test": {"loss": loss}}, **changes)


@pytest.mark.parametrize("count", [3, 5, 8])
def test_seeds_give_scipys_t_interval(count):
    found = stats.estimate(SAMPLE[:count])
    exact = scipy_stats.ttest_1samp(SAMPLE[:count], 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(SAMPLE[:count]))
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), rel=1e-12)
    assert stats.estimate([0.25] * count) == stats.Estimate(0.25, 0.25, 0.25, count)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_seeds_give_no_interval(count):
    found = stats.estimate(SAMPLE[:count])
    assert (found.low, found.high, found.count) == (None, None, count)


@pytest.mark.parametrize(
    ("count", "trials", "share"), [(3, 3000, 0.95), (4, 3000, 0.95), (8, 3000, 0.95), (16, 3000, 0.95)]
)
def test_how_often_the_interval_covers_the_truth(count, trials, share):
    """In 19 of 20 cases, of few seeds as of many."""
    found = [stats.estimate(row) for row in np.random.default_rng(3).normal(size=(trials, count))]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert abs(covered - share) <= 4 * math.sqrt(share * (1 - share) / trials)


def test_differences_are_paired_by_seed_whatever_the_order():
    a = [final("lora", seed, loss) for seed, loss in [(2, 0.5), (0, 0.1), (1, 0.3)]]
    b = [final("full", seed, loss) for seed, loss in [(1, 0.2), (2, 0.2), (0, 0.2), (7, 0.9)]]
    gap = stats.paired_differences(a, b, "loss")
    assert (gap.method, gap.baseline, gap.value) == ("lora", "full", "test loss")
    assert gap.seeds == (0, 1, 2) and gap.left_out == (7,)
    assert gap.differences == pytest.approx((-0.1, 0.1, 0.3))
    assert gap.estimate.mean == pytest.approx(0.1)


def test_pairing_removes_what_seeds_share():
    """Seeds move both methods by +-1 and the gap is 0.1: unpaired it drowns, paired it shows."""
    shared = [1.0, -1.0, 0.5, -0.5]
    noise = [0.001, -0.001, 0.002, -0.002]
    a = [final("lora", seed, 2 + s + 0.1 + e) for seed, (s, e) in enumerate(zip(shared, noise, strict=True))]
    b = [final("full", seed, 2 + s) for seed, s in enumerate(shared)]
    assert stats.paired_differences(a, b, "loss").verdict == "above"
    assert stats.paired_differences(b, a, "loss").verdict == "below"


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [([0.1, 0.11, 0.09], "above"), ([-0.1, -0.11, -0.09], "below"), ([0.1, -0.1, 0.02], "within noise"),
     ([0.1, 0.1], "too few seeds"), ([], "not comparable")],
)  # fmt: skip
def test_verdicts(gaps, verdict):
    a = [final("lora", seed, 1 + gap) for seed, gap in enumerate(gaps)] or [diverged("lora")]
    b = [final("full", seed, 1.0) for seed in range(max(1, len(gaps)))]
    gap = stats.paired_differences(a, b, "test loss")
    assert gap.verdict == verdict


@pytest.mark.parametrize("relative", [False, True])
def test_equal_differences_of_a_discrete_metric_are_not_certain(relative):
    """Of 500 test rows one more is right, by each of three seeds: how far such differences scatter is not known."""
    a, b = ([record(row, seed, final={"test": {"accuracy": right / 500}}) for seed in range(3)]
            for row, right in (("lora", 451), ("full", 450)))  # fmt: skip
    gap = stats.paired_differences(a, b, "accuracy", relative=relative)
    assert gap.estimate.mean > 0 and len(gap.differences) == 3
    assert stats.below(gap.differences, 0) == (1.0, 1.0)
    assert stats.below([-2.0] * 3, 0, counted=True) == (0.0, 1.0)  # parameters, say, are not drawn


def test_unfinished_runs_and_nan_are_left_out():
    a = [final("lora", 0, 0.5), final("lora", 1, 0.1, status="diverged"), final("lora", 2, math.nan)]
    b = [final("full", seed, 0.4) for seed in range(3)]
    gap = stats.paired_differences(a, b, "loss")
    assert gap.seeds == (0,) and gap.left_out == (1, 2)


def test_compare_takes_every_method_against_the_baseline():
    records = [record(method, seed) for method in ("head", "lora", "full") for seed in range(3)]
    found = stats.compare(records, "lora")
    asked = [(name, "lora", "test accuracy") for name in ("full", "head")]
    assert [(gap.method, gap.baseline, gap.value) for gap in found] == asked
    with pytest.raises(ParameterError, match="baseline='hira'.*full, lora, head"):
        stats.compare(records, "hira")

    records = [record("lora", seed, floor=0.4) for seed in range(3)]
    records += [record("full", seed, floor=0.3) for seed in range(3)]
    (gap,) = stats.compare(records, "full", lambda r: stats.loss_at(r, "accepted_steps", 20))
    assert gap.differences == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("what", "records"),
    [("at least one", []),
     ("one setting", [record("lora", 0), record("lora", 1, setting="other")]),
     ("one record per row and seed", [record("lora", 0), record("lora", 0)])],
)  # fmt: skip
def test_records_that_cannot_be_compared(what, records):
    with pytest.raises(ParameterError, match=f"^records=.*{what}"):
        stats.by_row(records)


def test_the_main_value_prefers_test_and_what_the_task_is_judged_by():
    assert stats.main_value([record()]) == "test accuracy"
    assert stats.main_value([record(final={"test": {"loss": 1.0, "accuracy": 0.8, "f1": 0.7}})]) == "test f1"
    assert stats.main_value([record(final={"validation": {"loss": 1.0, "perplexity": 2.7}})]) == "validation perplexity"
    assert stats.main_value([record(final={})]) == "test loss"


@pytest.mark.parametrize("x", ["accepted_steps", "steps", "tokens", "tokens_backpropagated", "flops", "seconds"])
def test_loss_at_lies_on_the_line_between_neighbours(x):
    run = record("lora", seed=2)
    places, losses = stats.curve(run, x)
    assert stats.loss_at(run, x, places[3]) == pytest.approx(losses[3])
    between = 0.25 * places[2] + 0.75 * places[3]
    assert stats.loss_at(run, x, between) == pytest.approx(0.25 * losses[2] + 0.75 * losses[3])


def test_loss_at_does_not_extrapolate():
    run = record("lora", points=6)
    assert stats.loss_at(run, "accepted_steps", 60) is not None
    assert stats.loss_at(run, "accepted_steps", 60.1) is None
    assert stats.loss_at(run, "accepted_steps", -1) is None
    assert stats.loss_at(record(curve=[]), "accepted_steps", 0) is None
    with pytest.raises(ParameterError, match="x='epochs'.*accepted_steps.*seconds"):
        stats.curve(record(), "epochs")


def test_a_curve_keeps_the_last_of_equal_x_and_only_finite_values():
    first, second, third, fourth = record(points=3).curve
    second = second.model_copy(update={"accepted_steps": 0, "validation": {"loss": 0.123}})  # a rejected batch
    third = third.model_copy(update={"validation": {"loss": math.inf}})
    fourth = fourth.model_copy(update={"validation": None})
    places, losses = stats.curve(record(curve=[first, second, third, fourth]), "accepted_steps")
    assert places.tolist() == [0] and losses.tolist() == [0.123]


def test_relative_differences_are_shares_of_the_baselines_value():
    a = [final("lora", seed, loss) for seed, loss in enumerate((0.51, 0.99, 2.2, 1.0))]
    b = [final("full", seed, loss) for seed, loss in enumerate((0.50, 1.00, 2.0, 0.0))]
    gap = stats.paired_differences(a, b, "loss", relative=True)
    assert gap.differences == pytest.approx((0.02, -0.01, 0.1))
    assert gap.seeds == (0, 1, 2) and gap.left_out == (3,)  # nothing is a share of 0


def test_at_equal_takes_each_pair_where_its_shorter_run_ends():
    long = [record("full", seed, floor=0.4, points=9) for seed in (0, 1, 2)]
    short = [record("lora", 0, floor=0.3, points=4), record("lora", 1, floor=0.5, points=6), record("lora", 7)]
    one = stats.at_equal(short, long, "accepted_steps")
    assert one.places == {0: 40, 1: 60} and one.gap.seeds == (0, 1) and one.gap.left_out == (2, 7)
    assert one.gap.differences == pytest.approx((-0.1, 0.1))
    assert one.gap.value == "validation loss at equal accepted_steps"
    assert stats.at_equal(long, short, "accepted_steps").gap.differences == pytest.approx((0.1, -0.1))


def test_at_equal_interpolates_the_run_that_goes_on():
    late = [point for point in record("full").curve if point.step in (0, 30, 60)]
    one = stats.at_equal([record("lora", points=4)], [record("full", curve=late)], "steps")
    losses = [0.4 + 0.3 * math.exp(-step / 20) for step in (30, 40, 60)]
    assert one.places == {0: 40}
    assert one.gap.differences == pytest.approx((losses[1] - (2 * losses[0] + losses[2]) / 3,))


def test_at_equal_leaves_out_runs_without_a_curve_and_pairs_that_never_start():
    empty, unmoved = record("lora", 0, curve=[]), record("lora", 1, curve=record().curve[:1])
    one = stats.at_equal([empty, unmoved], [record("full", seed) for seed in (0, 1)], "tokens")
    assert (one.gap.estimate, one.places, one.gap.left_out) == (None, {}, (0, 1))


def test_spearman_gives_ties_their_mean_rank():
    a, b = [1.0, 2.0, 2.0, 5.0, 0.5], [0.1, 0.4, 0.3, 0.3, 0.2]
    ranks = [2, 3.5, 3.5, 5, 1], [1, 5, 3.5, 3.5, 2]
    assert stats.spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert math.isnan(stats.spearman(a, [1.0] * 5))
