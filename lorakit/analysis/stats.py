"""Compare rows over seeds: mean of paired differences with a 95 % interval; a gap whose interval holds 0 is noise.

Pairs share a seed. From `BOOTSTRAP_SEEDS` pairs on the interval is a BCa bootstrap of the mean (a percentile bootstrap
where BCa is undefined: equal values). Below that it is Student's t: three resampled seeds lie all on one side of the
truth a quarter of the time, so a bootstrap of them, which never leaves their range, covers at most 75 %. Under
`MINIMUM_SEEDS` pairs no interval is given. The formulas are scipy's.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lorakit.analysis import names
from lorakit.errors import require
from lorakit.records import AXES, METRICS, Record

MINIMUM_SEEDS, BOOTSTRAP_SEEDS = 3, 8
LOSS = "validation loss"
# share of its own run from which on a run counts as finished: a linear schedule has 5 % of its rate left
DECAYED = 0.95

Value = str | Callable[[Record], float | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `low` and `high` bound it at 95 %, None where there are too few seeds to say."""

    mean: float
    low: float | None
    high: float | None
    count: int
    how: str  # "t", "BCa", "percentile" or "too few seeds"

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
        """ "above", "below", "within noise" or "too few seeds"."""
        if self.estimate is None or self.estimate.low is None:
            return "too few seeds"
        if self.estimate.low <= 0 <= self.estimate.high:
            return "within noise"
        return "above" if self.estimate.mean > 0 else "below"

    @property
    def better(self) -> bool | None:
        """Whether the verdict speaks for `method`; None where there is none, or nobody knows which way is better."""
        higher = METRICS.get(self.value.split(" at ")[0].split(" ")[-1])
        return None if higher is None or self.verdict not in ("above", "below") else (self.verdict == "above") == higher


def by_row(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each row, rows in the order of tables, seeds ascending.

    Raises:
        ParameterError: there are none, they are of several settings, or two are of the same row and seed.
    """
    require(len(records) > 0, "records", [], "at least one record")
    settings = sorted({record.setting for record in records})
    require(len(settings) == 1, "records", settings, "must be of one setting; others are not comparable")
    groups: dict[str, list[Record]] = {row: [] for row in names.order(record.row for record in records)}
    for record in sorted(records, key=lambda record: record.seed):
        groups[record.row].append(record)
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


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of `values` (N,) with its 95 % interval; `seed` draws the bootstrap, so equal input gives equal output."""
    sample = np.asarray(values, dtype=float)
    count, mean = len(sample), float(np.mean(sample))
    if count < MINIMUM_SEEDS:
        return Estimate(mean, None, None, count, "too few seeds")
    if count < BOOTSTRAP_SEEDS:
        from scipy.special import stdtrit  # what scipy.stats.t asks for; scipy.stats takes a second to load

        half = float(stdtrit(count - 1, 0.975)) * float(np.std(sample, ddof=1)) / math.sqrt(count)
        return Estimate(mean, mean - half, mean + half, count, "t")
    from scipy.stats import bootstrap

    for how in ("BCa", "percentile"):
        with warnings.catch_warnings(action="ignore"):  # BCa of equal values warns and gives NaN
            low, high = bootstrap((sample,), np.mean, method=how, rng=np.random.default_rng(seed)).confidence_interval
        if math.isfinite(low) and math.isfinite(high):
            break
    return Estimate(mean, float(low), float(high), count, how)


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
    sides = []
    for records in (records_a, records_b):
        ((row, group),) = by_row(records).items()
        sides.append((row, finished(group, value), {record.seed for record in group}))
    what = named(value) if isinstance(value, str) else getattr(value, "__name__", "value")
    return _difference(*sides, what, relative)


Side = tuple[str, dict[int, float], set[int]]  # a row, seed -> value of the runs that have one, every seed


def _difference(one: Side, other: Side, what: str, relative: bool = False) -> Difference:
    a, b = one[1], other[1]
    seeds = tuple(seed for seed in sorted(a.keys() & b.keys()) if not relative or b[seed] != 0)
    differences = tuple((a[seed] - b[seed]) / (abs(b[seed]) if relative else 1) for seed in seeds)
    return Difference(one[0], other[0], what, seeds, differences, tuple(sorted((one[2] | other[2]) - set(seeds))))


def compare(records: Sequence[Record], baseline: str, value: Value | None = None) -> list[Difference]:
    """Every other row against `baseline`; `value` defaults to the main metric.

    Raises:
        ParameterError: no record is of the baseline.
    """
    groups = by_row(records)
    require(baseline in groups, "baseline", baseline, f"must be one of {', '.join(groups)}")
    value = main_value(records) if value is None else value
    return [paired_differences(group, groups[baseline], value) for row, group in groups.items() if row != baseline]


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


def loss_at(record: Record, x: str, value: float, y: str = LOSS) -> float | None:
    """The validation loss when `x` had reached `value`, between its neighbours in line; None outside the curve.

    With it rows are compared at equal anything: `compare(records, "full", lambda r: loss_at(r, "flops", 1e12))`.
    """
    places, numbers = curve(record, x, y)
    inside = len(places) and places[0] <= value <= places[-1]
    return float(np.interp(value, places, numbers)) if inside else None


class Curves(NamedTuple):
    """One row's runs on one axis: seed -> curve of those that finished and have points; every seed."""

    row: str
    x: str
    y: str
    lines: dict[int, tuple[np.ndarray, np.ndarray]]
    seeds: set[int]
    constant: bool  # the learning rate does not decay


def curves(records: Sequence[Record], x: str, y: str = LOSS) -> Curves:
    """The curves of one row's records, to be compared `at_equal` x."""
    ((row, group),) = by_row(records).items()
    found = {record.seed: curve(record, x, y) for record in group if record.status == "done"}
    lines = {seed: line for seed, line in found.items() if len(line[0])}
    constant = all(record.resolved.get("schedule") == "constant" for record in group)
    return Curves(row, x, y, lines, {record.seed for record in group}, constant)


@dataclass(frozen=True)
class Comparison:
    """A row's curve minus another's where both had spent as much of `axis`.

    Attributes:
        places: seed -> the x of that pair.
        shares: row -> how much of its own run it had behind it there, the least of the pairs.
        over: the same of the row that was less far.
        fair: both runs of every pair were at the end of their own learning-rate schedule, or have none (`constant`).
    """

    axis: str
    gap: Difference
    places: dict[int, float]
    shares: dict[str, float]
    over: float
    constant: bool

    @property
    def fair(self) -> bool:
        return bool(self.places) and (self.constant or self.over >= DECAYED)


def at_equal(a: Curves, b: Curves) -> Comparison:
    """a minus b at equal x, each pair at the largest x that both its runs reach.

    One run of a pair is then at its end, the other perhaps not: see `shares` before calling the pair fair.
    A pair that never leaves x = 0 is left out.
    """
    ends = {seed: [float(side.lines[seed][0][-1]) for side in (a, b)] for seed in a.lines.keys() & b.lines.keys()}
    common = {seed: min(pair) for seed, pair in ends.items() if min(pair) > 0}
    sides = []
    for side in (a, b):
        begun = {seed: place for seed, place in common.items() if side.lines[seed][0][0] <= place}
        found = {seed: float(np.interp(place, *side.lines[seed])) for seed, place in begun.items()}
        sides.append((side.row, found, side.seeds))
    gap = _difference(*sides, f"{a.y} at equal {a.x}")
    places = {seed: common[seed] for seed in gap.seeds}
    shares = [min((x / ends[seed][side] for seed, x in places.items()), default=0.0) for side in (0, 1)]
    told = dict(zip((a.row, b.row), shares, strict=True))
    return Comparison(a.x, gap, places, told, min(shares), a.constant and b.constant)
