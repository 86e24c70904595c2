"""Compare rows over seeds: mean of paired differences with a 95 % interval; a gap whose interval holds 0 is noise.

Pairs share a seed. The interval is Student's t: a bootstrap of so few seeds is too narrow (of 8 normal ones BCa covers
88 % for 95, of 20 still 92). Under `MINIMUM_SEEDS` pairs no interval is given. The formulas are scipy's.

What paired seeds can tell: Student's one-sided tests, Holm's correction, the smallest effect, the seeds it takes.
"""

import bisect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lorakit.analysis import names
from lorakit.errors import require
from lorakit.records import AXES, METRICS, Record

MINIMUM_SEEDS = 3
LOSS = "validation loss"
# share of its own run from which on a run counts as finished: a linear schedule has 5 % of its rate left
DECAYED = 0.95
ALPHA, POWER, ROUNDING = 0.05, 0.8, 1e-9

Value = str | Callable[[Record], float | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `low` and `high` bound it at 95 %, None where there are too few seeds to say."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def interval(self, form: str = "{:+.3f}") -> str:
        """ "[-0.012, +0.034]"; empty where there is none."""
        return "" if self.low is None else f"[{form.format(self.low)}, {form.format(self.high)}]"


@dataclass(frozen=True)
class Difference:
    """`method` minus `baseline` over the seeds that finished in both; `left_out` are the other seeds.

    Where it is relative, each pair's difference is a share of the baseline's value.
    """

    method: str
    baseline: str
    value: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    left_out: tuple[int, ...]

    @cached_property
    def estimate(self) -> Estimate | None:
        """None where no seed finished in both."""
        return estimate(self.differences) if self.differences else None

    @property
    def verdict(self) -> str:
        """ "above", "below", "within noise", "too few seeds" or, where no seed has both values, "not comparable"."""
        if self.estimate is None or self.estimate.low is None:
            return "too few seeds" if self.estimate else "not comparable"
        if self.estimate.low <= 0 <= self.estimate.high:
            return "within noise"
        return "above" if self.estimate.mean > 0 else "below"


def by_row(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each row, rows in the order of tables, seeds ascending.

    Raises:
        ParameterError: there are none, they are of several settings, or two are of the same row and seed.
    """
    require(len(records) > 0, "records", [], "at least one record")
    settings = sorted({record.setting for record in records})
    require(len(settings) == 1, "records", settings, "must be of one setting; others are not comparable")
    ordered = sorted(records, key=lambda record: record.seed)
    groups = {row: [r for r in ordered if r.row == row] for row in names.order(r.row for r in records)}
    for row, group in groups.items():
        seeds = [record.seed for record in group]
        require(len(set(seeds)) == len(seeds), "records", f"{row}, seeds {seeds}", "one record per row and seed")
    return groups


def named(value: str, split: str = "test") -> str:
    """`value` with its split in front, `split` where it says none: "accuracy" -> "test accuracy"."""
    return value if value.startswith(("test ", "validation ", "train ")) else f"{split} {value}"


def main_value(records: Sequence[Record]) -> str:
    """The metric these records are judged by, on test data where they have it: "test accuracy", …"""
    known = {f"{split} {metric}" for record in records for split, found in record.final.items() for metric in found}
    wanted = (f"{split} {metric}" for split in ("test", "validation") for metric in METRICS)
    return next((value for value in wanted if value in known), "test loss")


def finished(records: Sequence[Record], value: Value) -> dict[int, float]:
    """Seed -> value, of the runs that ended by themselves with a finite value.

    Args:
        value: "test accuracy", "validation loss", … (test if unsaid), or a function of a record.
    """
    split, _, metric = (named(value) if isinstance(value, str) else "").partition(" ")
    of = value if callable(value) else lambda record: record.final.get(split, {}).get(metric)
    found = {record.seed: of(record) for record in records if record.status == "done"}
    return {seed: float(number) for seed, number in found.items() if number is not None and math.isfinite(number)}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of `values` (N,) with its 95 % interval."""
    sample = np.asarray(values, dtype=float)
    count, mean = len(sample), float(np.mean(sample))
    if count < MINIMUM_SEEDS:
        return Estimate(mean, None, None, count)
    from scipy.special import stdtrit  # what scipy.stats.t asks for; scipy.stats takes a second to load

    half = float(stdtrit(count - 1, 0.975)) * float(np.std(sample, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of two lists (N,), equal values sharing their mean rank; NaN where one is constant."""
    from scipy.stats import spearmanr

    with warnings.catch_warnings(action="ignore"):  # of a constant list
        return float(spearmanr(a, b).statistic)


def paired_differences(
    records_a: Sequence[Record], records_b: Sequence[Record], value: Value, *, relative: bool = False
) -> Difference:
    """`value` of `records_a` minus that of `records_b`, seed by seed. Each side is one row's records.

    With `relative` a pair's difference is divided by b's value; a pair where that is 0 is left out.
    """
    require(records_a[0].setting == records_b[0].setting, "records", records_b[0].setting, "must be of one setting")
    (row, group), (baseline, others) = (*by_row(records_a).items(), *by_row(records_b).items())
    a, b = finished(group, value), finished(others, value)
    seeds = tuple(seed for seed in sorted(a.keys() & b.keys()) if not relative or b[seed] != 0)
    differences = tuple((a[seed] - b[seed]) / (abs(b[seed]) if relative else 1) for seed in seeds)
    left_out = tuple(sorted({record.seed for record in (*group, *others)}.difference(seeds)))
    what = named(value) if isinstance(value, str) else getattr(value, "__name__", "value")
    return Difference(row, baseline, what, seeds, differences, left_out)


def compare(records: Sequence[Record], baseline: str, value: Value | None = None) -> list[Difference]:
    """Every other row against `baseline`; `value` defaults to the main metric.

    Raises:
        ParameterError: no record is of the baseline.
    """
    groups = by_row(records)
    require(baseline in groups, "baseline", baseline, f"must be one of {', '.join(groups)}")
    value = main_value(records) if value is None else value
    return [paired_differences(group, groups[baseline], value) for row, group in groups.items() if row != baseline]


# what seeds can tell -------------------------------------------------------------------------------


def below(sample: Sequence[float], limit: float, strict: bool = False, counted: bool = False) -> tuple[float, float]:
    """One-sided p of Student's t that the mean of `sample` (n,) is below `limit`, and that it is above it.

    Without spread nothing is known of what was drawn (both are 1), as an accuracy, and what was `counted`, as bytes, is
    certain; at the limit it is below, unless `strict`.
    """
    from scipy.stats import ttest_1samp

    if np.ptp(sample) > ROUNDING:
        return tuple(float(ttest_1samp(sample, limit, alternative=side).pvalue) for side in ("less", "greater"))
    gap = float(np.mean(sample)) - limit
    held = gap < -ROUNDING or (gap <= ROUNDING and not strict)
    return (1.0 - held, float(held)) if counted else (1.0, 1.0)


def smallest_effect(spread: float, count: int, alpha: float = ALPHA, width: float = math.inf) -> float:
    """How far from a limit the mean of `count` pairs of standard deviation `spread` must be for 80 % power.

    Student's test, two-sided at `alpha`; with a finite `width`, between two limits so far apart, by both one-sided
    tests (∞: nowhere there). The power is a mean over what the sample's own deviation comes out as.
    """
    from scipy.optimize import brentq
    from scipy.special import gammaincinv, ndtr, stdtrit

    error, shares = spread / math.sqrt(count), (np.arange(4000) + 0.5) / 4000
    drawn = np.sqrt(2 * gammaincinv((count - 1) / 2, shares) / (count - 1))  # (4000,): χ / √n − 1, equally likely
    reach = error * stdtrit(count - 1, 1 - alpha / 2) * drawn

    def lacking(distance: float) -> float:
        inside = ndtr((distance - reach) / error) - ndtr((reach + distance - width) / error)
        return POWER - float(np.mean(inside.clip(0)))

    most = min(width / 2, 2 * float(reach.max()))
    return brentq(lacking, 0, most) if lacking(most) <= 0 else math.inf


def seeds_needed(spread: float, distance: float, alpha: float = ALPHA, width: float = math.inf) -> float:
    """The fewest pairs whose `smallest_effect` is at most `distance`; ∞ from ten thousand on."""
    counts = range(MINIMUM_SEEDS, 10_000)
    place = bisect.bisect_left(counts, True, key=lambda n: smallest_effect(spread, n, alpha, width) <= distance)
    return counts[place] if place < len(counts) else math.inf


def holm(p_values: Sequence[float], of: int) -> list[float]:
    """Holm's (1979) adjusted p-values, of which there are `of`, some perhaps not known yet and counted as large."""
    ascending, order = np.sort(p_values), np.argsort(p_values)
    return np.maximum.accumulate((of - np.arange(len(order))) * ascending).clip(max=1)[np.argsort(order)].tolist()


# at equal cost ---------------------------------------------------------------------------------------


def curve(record: Record, x: str, y: str = LOSS) -> tuple[np.ndarray, np.ndarray]:
    """Finite points (N,), (N,) of a record's curve, x ascending; `y` is "train loss" or a validation metric.

    Where several points share an x (rejected batches move no accepted step) the last one counts.
    """
    require(x in AXES, "x", x, f"must be one of {', '.join(AXES)}")
    field, metric = AXES[x].field, y.removeprefix("validation ")
    points = {}
    for point in record.curve:
        number = point.train_loss if y == "train loss" else (point.validation or {}).get(metric)
        if number is not None and math.isfinite(number):
            points[float(getattr(point, field))] = float(number)
    places = np.array(sorted(points))
    return places, np.array([points[place] for place in places])


def loss_at(record: Record, x: str, value: float) -> float | None:
    """The validation loss when `x` had reached `value`, between its neighbours in line; None outside the curve.

    With it rows are compared at equal anything: `compare(records, "full", lambda r: loss_at(r, "flops", 1e12))`.
    """
    places, numbers = curve(record, x)
    return float(np.interp(value, places, numbers)) if len(places) and places[0] <= value <= places[-1] else None


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """The smallest x at which y, points (N,) joined by lines, is `level` or above; None: never."""
    if not len(above := np.flatnonzero(y >= level)):
        return None
    pair = slice(max(above[0] - 1, 0), above[0] + 1)
    return float(np.interp(level, y[pair], x[pair]))


@dataclass(frozen=True)
class Comparison:
    """A row's curve minus another's where both had spent as much of `axis`.

    Attributes:
        places: seed -> the x of that pair.
        shares: row -> how much of its own run it had behind it there, the least of the pairs.
        fair: both runs of every pair were at the end of their own learning-rate schedule, or have none (`constant`).
    """

    axis: str
    gap: Difference
    places: dict[int, float]
    shares: dict[str, float]
    constant: bool

    @property
    def fair(self) -> bool:
        return bool(self.places) and (self.constant or min(self.shares.values()) >= DECAYED)


def at_equal(a: Sequence[Record], b: Sequence[Record], x: str) -> Comparison:
    """One row's records minus another's at equal x, each pair at the largest x that both its runs reach.

    One run of a pair is then at its end, the other perhaps not: see `shares` before calling the pair fair.
    A pair that never leaves x = 0 is left out.
    """
    ends = [{run.seed: float(places[-1]) for run in side if len(places := curve(run, x)[0])} for side in (a, b)]
    common = {seed: min(end[seed] for end in ends) for seed in ends[0].keys() & ends[1].keys()}
    gap = paired_differences(a, b, lambda run: loss_at(run, x, common[run.seed]) if common.get(run.seed) else None)
    places = {seed: common[seed] for seed in gap.seeds}
    shares = [min((place / end[seed] for seed, place in places.items()), default=0.0) for end in ends]
    told = dict(zip((gap.method, gap.baseline), shares, strict=True))
    constant = all(run.resolved.get("schedule") == "constant" for run in (*a, *b))
    return Comparison(x, replace(gap, value=f"{LOSS} at equal {x}"), places, told, constant)
