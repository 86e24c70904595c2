"""Statistics against scipy, brute force and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from synthetic_records import diverged, record

from lorakit import stats
from lorakit.errors import ParameterError

SAMPLE = [0.3, -0.1, 0.25, 0.7, 0.05, 0.4, -0.2, 0.9]


def final(method: str, seed: int, loss: float, **changes):
    return record(method, seed, final={"test": {"loss": loss}}, **changes)


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 29, 30, 31, 50, 500])
def test_t_quantile_is_scipys(freedom):
    assert stats.t_quantile(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), abs=1e-4)


@pytest.mark.parametrize("count", [3, 5, 7])
def test_few_seeds_give_scipys_t_interval(count):
    found = stats.estimate(SAMPLE[:count])
    exact = scipy_stats.ttest_1samp(SAMPLE[:count], 0).confidence_interval(0.95)
    assert found.how == "t"
    assert found.mean == pytest.approx(np.mean(SAMPLE[:count]))
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_seeds_give_no_interval(count):
    found = stats.estimate(SAMPLE[:count])
    assert (found.low, found.high, found.count, found.how) == (None, None, count, "too few seeds")


def exact_bootstrap(values: list[float], share: float) -> tuple[float, float]:
    """Quantiles of the mean over all n^n resamples, each multiset weighted by how many orders it has."""
    n = len(values)
    means, weights = [], []
    for drawn in itertools.combinations_with_replacement(range(n), n):
        counts = np.bincount(drawn, minlength=n)
        means.append(np.dot(counts, values) / n)
        weights.append(math.factorial(n) / math.prod(math.factorial(count) for count in counts) / n**n)
    order = np.argsort(means)
    reached = np.cumsum(np.array(weights)[order])
    low, high = np.searchsorted(reached, [share, 1 - share])
    return means[order[low]], means[order[high]]


def test_bootstrap_is_the_exact_distribution_up_to_sampling():
    found = stats.estimate(SAMPLE)
    share = stats.tail(len(SAMPLE))
    low, high = exact_bootstrap(SAMPLE, share)
    error = 4 * math.sqrt(share * (1 - share) / stats.RESAMPLES)  # of the share that a drawn quantile really cuts off
    lowest, lower = exact_bootstrap(SAMPLE, share - error)[0], exact_bootstrap(SAMPLE, share + error)[0]
    highest, higher = exact_bootstrap(SAMPLE, share - error)[1], exact_bootstrap(SAMPLE, share + error)[1]
    assert found.how == "bootstrap"
    assert lowest <= found.low <= lower and lowest <= low <= lower
    assert higher <= found.high <= highest and higher <= high <= highest


def test_bootstrap_agrees_with_scipys():
    level = 1 - 2 * stats.tail(len(SAMPLE))
    oracle = scipy_stats.bootstrap(
        (SAMPLE,), np.mean, confidence_level=level, method="percentile", n_resamples=20_000, random_state=1
    ).confidence_interval
    found = stats.estimate(SAMPLE)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.02)


def test_equal_input_gives_equal_output_and_the_seed_draws():
    assert stats.estimate(SAMPLE) == stats.estimate(list(SAMPLE))
    assert stats.estimate(SAMPLE, seed=1).low != stats.estimate(SAMPLE, seed=2).low


def covered(count: int, trials: int) -> float:
    draws = np.random.default_rng(3).normal(size=(trials, count))
    found = [stats.estimate(row) for row in draws]
    return float(np.mean([one.low <= 0 <= one.high for one in found]))


@pytest.mark.parametrize(
    ("count", "trials", "slack"), [(3, 3000, 0.0), (4, 3000, 0.0), (8, 600, 0.02), (16, 400, 0.02)]
)
def test_the_interval_covers_the_truth_in_19_of_20_cases(count, trials, slack):
    """`slack`: a bootstrap is not exact; 0.95 +- (slack + 4 standard errors)."""
    bound = slack + 4 * math.sqrt(0.95 * 0.05 / trials)
    assert abs(covered(count, trials) - 0.95) <= bound


def test_a_bootstrap_of_three_seeds_would_not_cover():
    """Why few seeds get a t-interval: not even their whole range holds the truth more than 75 % of the time."""
    draws = np.random.default_rng(4).normal(size=(4000, 3))
    inside = np.mean((draws.min(axis=1) <= 0) & (draws.max(axis=1) >= 0))
    assert inside == pytest.approx(0.75, abs=0.03)


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
     ([0.1, 0.1], "too few seeds"), ([], "too few seeds")],
)  # fmt: skip
def test_verdicts(gaps, verdict):
    a = [final("lora", seed, 1 + gap) for seed, gap in enumerate(gaps)] or [diverged("lora")]
    b = [final("full", seed, 1.0) for seed in range(max(1, len(gaps)))]
    assert stats.paired_differences(a, b, "test loss").verdict == verdict


def test_unfinished_runs_and_nan_are_left_out():
    a = [final("lora", 0, 0.5), final("lora", 1, 0.1, status="diverged"), final("lora", 2, math.nan)]
    b = [final("full", seed, 0.4) for seed in range(3)]
    gap = stats.paired_differences(a, b, "loss")
    assert gap.seeds == (0,) and gap.left_out == (1, 2)


def test_compare_takes_every_method_against_the_baseline():
    records = [record(method, seed) for method in ("head", "lora", "full") for seed in range(3)]
    found = stats.compare(records, "lora")
    assert [(gap.method, gap.baseline, gap.value) for gap in found] == [
        ("full", "lora", "test accuracy"),
        ("head", "lora", "test accuracy"),
    ]
    with pytest.raises(ParameterError, match="baseline='hira'.*full, lora, head"):
        stats.compare(records, "hira")


def test_compare_at_an_equal_budget():
    records = [record("lora", seed, floor=0.4) for seed in range(3)]
    records += [record("full", seed, floor=0.3) for seed in range(3)]
    (gap,) = stats.compare(records, "full", lambda r: stats.loss_at(r, "accepted_steps", 20))
    assert gap.differences == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("what", "records"),
    [("at least one", []),
     ("one setting", [record("lora", 0), record("lora", 1, setting="other")]),
     ("one record per method and seed", [record("lora", 0), record("lora", 0)])],
)  # fmt: skip
def test_records_that_cannot_be_compared(what, records):
    with pytest.raises(ParameterError, match=f"^records=.*{what}"):
        stats.by_method(records)


def test_methods_come_in_one_order():
    records = [record(method) for method in ("zeta", "head", "alpha", "full", "lora")]
    assert list(stats.by_method(records)) == ["full", "lora", "head", "alpha", "zeta"]


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


def test_a_curve_keeps_the_last_of_equal_x_and_only_finite_values():
    first, second, third, fourth = record(points=3).curve
    second = second.model_copy(update={"accepted_steps": 0, "validation": {"loss": 0.123}})  # a rejected batch
    third = third.model_copy(update={"validation": {"loss": math.inf}})
    fourth = fourth.model_copy(update={"validation": None})
    places, losses = stats.curve(record(curve=[first, second, third, fourth]), "accepted_steps")
    assert places.tolist() == [0] and losses.tolist() == [0.123]


def test_unknown_x_is_an_error():
    with pytest.raises(ParameterError, match="x='epochs'.*accepted_steps.*seconds"):
        stats.curve(record(), "epochs")


def test_relative_differences_are_shares_of_the_baselines_value():
    a = [final("lora", seed, loss) for seed, loss in enumerate((0.51, 0.99, 2.2, 1.0))]
    b = [final("full", seed, loss) for seed, loss in enumerate((0.50, 1.00, 2.0, 0.0))]
    gap = stats.paired_differences(a, b, "loss", relative=True)
    assert gap.differences == pytest.approx((0.02, -0.01, 0.1))
    assert gap.seeds == (0, 1, 2) and gap.left_out == (3,)  # nothing is a share of 0


def test_at_equal_takes_each_pair_where_its_shorter_run_ends():
    long = [record("full", seed, floor=0.4, points=9) for seed in (0, 1, 2)]
    short = [record("lora", 0, floor=0.3, points=4), record("lora", 1, floor=0.5, points=6), record("lora", 7)]
    gap, places = stats.at_equal(short, long, "accepted_steps")
    assert places == {0: 40, 1: 60} and gap.seeds == (0, 1) and gap.left_out == (2, 7)
    assert gap.differences == pytest.approx((-0.1, 0.1))
    assert gap.value == "validation loss at equal accepted_steps"
    assert stats.at_equal(long, short, "accepted_steps")[0].differences == pytest.approx((0.1, -0.1))


def test_at_equal_interpolates_the_run_that_goes_on():
    late = [point for point in record("full").curve if point.step in (0, 30, 60)]
    gap, places = stats.at_equal([record("lora", points=4)], [record("full", curve=late)], "steps")
    losses = [0.4 + 0.3 * math.exp(-step / 20) for step in (30, 40, 60)]
    assert places == {0: 40}
    assert gap.differences == pytest.approx((losses[1] - (2 * losses[0] + losses[2]) / 3,))


def test_at_equal_leaves_out_runs_without_a_curve_and_pairs_that_never_start():
    empty, unmoved = record("lora", 0, curve=[]), record("lora", 1, curve=record().curve[:1])
    gap, places = stats.at_equal([empty, unmoved], [record("full", seed) for seed in (0, 1)], "tokens")
    assert (gap.estimate, places, gap.left_out) == (None, {}, (0, 1))
