"""Compare methods over seeds: mean of paired differences with a 95 % interval; a gap whose interval holds 0 is noise.

Pairs share a seed. From `BOOTSTRAP_SEEDS` pairs on the interval is a percentile bootstrap of the mean, its percentiles
widened for small samples (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.2). Below that it
is Student's t: three resampled seeds lie all on one side of the truth a quarter of the time, so a bootstrap of them,
which never leaves their range, covers at most 75 %. Under `MINIMUM_SEEDS` pairs no interval is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lorakit import style
from lorakit.errors import ParameterError, require
from lorakit.records import Record

MINIMUM_SEEDS, BOOTSTRAP_SEEDS = 3, 8
RESAMPLES = 10_000
X_FIELDS = {
    "accepted_steps": "accepted_steps",
    "steps": "step",
    "tokens": "tokens",
    "tokens_backpropagated": "tokens_backpropagated",
    "flops": "flops",
    "seconds": "seconds",
}
# What a method is judged by: the first of these that its task reports.
MAIN_METRICS = ("f1", "accuracy", "exact_match", "perplexity", "pseudo_perplexity", "loss")
# Student's t, 97.5 % quantile, for 1 … 30 degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
         2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
         2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)  # fmt: skip

Value = str | Callable[[Record], float | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `low` and `high` bound it at 95 %, None where there are too few seeds to say."""

    mean: float
    low: float | None
    high: float | None
    count: int
    how: str  # "t", "bootstrap" or "too few seeds"


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
    estimate: Estimate | None  # None: no seed finished in both

    @property
    def verdict(self) -> str:
        """ "above", "below", "within noise" or "too few seeds"."""
        if self.estimate is None or self.estimate.low is None or self.estimate.high is None:
            return "too few seeds"
        if self.estimate.low <= 0 <= self.estimate.high:
            return "within noise"
        return "above" if self.estimate.mean > 0 else "below"


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each method, methods in the registry's order, seeds ascending.

    Raises:
        ParameterError: there are none, they are of several settings, or two are of the same method and seed.
    """
    require(len(records) > 0, "records", [], "at least one record")
    settings = sorted({record.setting for record in records})
    require(len(settings) == 1, "records", settings, "must be of one setting; others are not comparable")
    groups: dict[str, list[Record]] = {name: [] for name in style.order(record.method for record in records)}
    for record in sorted(records, key=lambda record: record.seed):
        groups[record.method].append(record)
    for name, group in groups.items():
        seeds = [record.seed for record in group]
        require(len(set(seeds)) == len(seeds), "records", f"{name}, seeds {seeds}", "one record per method and seed")
    return groups


def value_of(record: Record, value: Value) -> float | None:
    """A final number of a record: `value` is "test accuracy", "validation loss", … (test if unsaid) or a function."""
    if callable(value):
        return value(record)
    split, _, metric = named(value).partition(" ")
    return record.final.get(split, {}).get(metric)


def named(value: str) -> str:
    """`value` with its split in front: "accuracy" -> "test accuracy"."""
    return value if value.startswith(("test ", "validation ")) else f"test {value}"


def main_value(records: Sequence[Record]) -> str:
    """The metric these records are judged by, on test data where they have it: "test accuracy", …"""
    for split in ("test", "validation"):
        for metric in MAIN_METRICS:
            if any(metric in record.final.get(split, {}) for record in records):
                return f"{split} {metric}"
    return "test loss"


def finished(records: Sequence[Record], value: Value) -> dict[int, float]:
    """Seed -> value, of the runs that ended by themselves with a finite value."""
    found = {record.seed: value_of(record, value) for record in records if record.status == "done"}
    return {seed: float(number) for seed, number in found.items() if number is not None and math.isfinite(number)}


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of `values` (N,) with its 95 % interval; `seed` draws the bootstrap, so equal input gives equal output."""
    sample = np.asarray(values, dtype=float)
    count, mean = len(sample), float(np.mean(sample))
    if count < MINIMUM_SEEDS:
        return Estimate(mean, None, None, count, "too few seeds")
    if count < BOOTSTRAP_SEEDS:
        half = t_quantile(count - 1) * float(np.std(sample, ddof=1)) / math.sqrt(count)
        return Estimate(mean, mean - half, mean + half, count, "t")
    low, high = _bootstrap(sample, seed)
    return Estimate(mean, low, high, count, "bootstrap")


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: a table to 30 degrees of freedom, then its expansion around the normal's."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def tail(count: int) -> float:
    """Share cut off at each end of a bootstrap of `count` values: 2.5 %, less what makes up for a small sample."""
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * t_quantile(count - 1))


def _bootstrap(sample: np.ndarray, seed: int) -> tuple[float, float]:
    rows = np.random.default_rng(seed).integers(len(sample), size=(RESAMPLES, len(sample)))
    share = tail(len(sample))
    low, high = np.quantile(sample[rows].mean(axis=1), [share, 1 - share])
    return float(low), float(high)


def paired_differences(
    records_a: Sequence[Record], records_b: Sequence[Record], value: Value, *, relative: bool = False
) -> Difference:
    """`value` of `records_a` minus that of `records_b`, seed by seed. Each side is one method's records.

    With `relative` a pair's difference is divided by b's value; a pair where that is 0 is left out.
    """
    (name_a,), (name_b,) = by_method(records_a), by_method(records_b)
    require(records_a[0].setting == records_b[0].setting, "records", records_b[0].setting, "must be of one setting")
    a, b = finished(records_a, value), finished(records_b, value)
    seeds = tuple(seed for seed in sorted(a.keys() & b.keys()) if not relative or b[seed] != 0)
    differences = tuple((a[seed] - b[seed]) / (abs(b[seed]) if relative else 1) for seed in seeds)
    everyone = {record.seed for record in (*records_a, *records_b)}
    what = named(value) if isinstance(value, str) else getattr(value, "__name__", "value")
    mean = estimate(differences) if differences else None
    return Difference(name_a, name_b, what, seeds, differences, tuple(sorted(everyone - set(seeds))), mean)


def compare(records: Sequence[Record], baseline: str, value: Value | None = None) -> list[Difference]:
    """Every other method against `baseline`; `value` defaults to the main metric.

    Raises:
        ParameterError: no record is of the baseline.
    """
    groups = by_method(records)
    require(baseline in groups, "baseline", baseline, f"must be one of {', '.join(groups)}")
    value = main_value(records) if value is None else value
    return [paired_differences(group, groups[baseline], value) for name, group in groups.items() if name != baseline]


def curve(record: Record, x: str, y: str = "validation loss") -> tuple[np.ndarray, np.ndarray]:
    """Finite points (N,), (N,) of a record's curve, x ascending; `y` is "train loss" or a validation metric.

    Where several points share an x (rejected batches move no accepted step) the last one counts.
    """
    if x not in X_FIELDS:
        raise ParameterError("x", x, f"must be one of {', '.join(X_FIELDS)}")
    metric = y.removeprefix("validation ")
    points: dict[float, float] = {}
    for point in record.curve:
        number = point.train_loss if y == "train loss" else (point.validation or {}).get(metric)
        if number is not None and math.isfinite(number):
            points[float(getattr(point, X_FIELDS[x]))] = float(number)
    places = sorted(points)
    return np.array(places), np.array([points[place] for place in places])


def loss_at(record: Record, x: str, value: float, y: str = "validation loss") -> float | None:
    """The validation loss when `x` had reached `value`, between its neighbours in line; None outside the curve.

    With it methods are compared at equal anything: `compare(records, "full", lambda r: loss_at(r, "flops", 1e12))`.
    """
    places, numbers = curve(record, x, y)
    if not len(places) or not places[0] <= value <= places[-1]:
        return None
    return float(np.interp(value, places, numbers))


def ends(records: Sequence[Record], x: str, y: str = "validation loss") -> dict[int, float]:
    """Seed -> where the curve of that run ends on `x`; runs without a point of `y` are left out."""
    places = {record.seed: curve(record, x, y)[0] for record in records}
    return {seed: float(xs[-1]) for seed, xs in places.items() if len(xs)}


def at_equal(
    records_a: Sequence[Record], records_b: Sequence[Record], x: str, y: str = "validation loss"
) -> tuple[Difference, dict[int, float]]:
    """`y` of a minus b at equal `x`, each pair at the largest `x` that both its runs reach; and seed -> that `x`.

    One run of a pair is then at its end, the other perhaps not: see how far it was before calling the pair fair.
    A pair that never leaves x = 0 is left out.
    """
    a, b = ends(records_a, x, y), ends(records_b, x, y)
    places = {seed: min(a[seed], b[seed]) for seed in a.keys() & b.keys() if min(a[seed], b[seed]) > 0}

    def value(record: Record) -> float | None:
        return loss_at(record, x, places[record.seed], y) if record.seed in places else None

    value.__name__ = f"{y} at equal {x}"
    gap = paired_differences(records_a, records_b, value)
    return gap, {seed: places[seed] for seed in gap.seeds}
