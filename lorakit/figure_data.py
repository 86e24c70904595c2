"""The numbers behind every figure: pure functions of records, so that a test can check what a picture shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lorakit import stats
from lorakit.errors import ParameterError, require
from lorakit.records import Record

FAILED = ("diverged", "out_of_memory")
Score = tuple[dict[int, float], stats.Estimate]


class Path(NamedTuple):
    """One run that did not finish: its points (N,), and how it ended."""

    x: np.ndarray
    y: np.ndarray
    seed: int
    status: str


class Curve(NamedTuple):
    """One method: mean, lowest and highest y (N,) over its finished seeds at x (N,), and its unfinished runs."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: tuple[int, ...]
    unfinished: tuple[Path, ...]


def curve_table(records: Sequence[Record], x: str = "accepted_steps", y: str = "validation loss") -> dict[str, Curve]:
    """Method -> its curve. Seeds are put on all their x together, within the range every one of them covers.

    Raises:
        ParameterError: `x` is no axis, or `y` is in none of the records while others are.
    """
    _require_y(records, y)
    return {method: _curve(group, x, y) for method, group in stats.by_method(records).items()}


def _require_y(records: Sequence[Record], y: str) -> None:
    points = [point for record in records for point in record.curve]
    known = {f"validation {name}" for point in points for name in point.validation or {}}
    known |= {"train loss"} if any(point.train_loss is not None for point in points) else set()
    asked = y if y == "train loss" or y.startswith("validation ") else f"validation {y}"
    require(not known or asked in known, "y", y, f"must be one of {', '.join(sorted(known))}")


def _curve(group: list[Record], x: str, y: str) -> Curve:
    return over_seeds([(record, *stats.curve(record, x, y)) for record in group])


def over_seeds(lines: Sequence[tuple[Record, np.ndarray, np.ndarray]]) -> Curve:
    """One method's runs, each with x (N,) ascending and y (N,), as a curve over its seeds; N may be 0."""
    done = [line for line in lines if line[0].status == "done" and len(line[1])]
    rest = tuple(Path(xs, ys, r.seed, r.status) for r, xs, ys in lines if r.status != "done")
    if not done:
        return Curve(*np.empty((4, 0)), seeds=(), unfinished=rest)
    start, end = max(xs[0] for _, xs, _ in done), min(xs[-1] for _, xs, _ in done)
    grid = np.unique(np.concatenate([xs for _, xs, _ in done]))
    grid = grid[(grid >= start) & (grid <= end)]
    table = np.stack([np.interp(grid, xs, ys) for _, xs, ys in done])  # (seeds, N)
    seeds = tuple(record.seed for record, _, _ in done)
    return Curve(grid, table.mean(0), table.min(0), table.max(0), seeds, rest)


def exit_point(path: Path, top: float) -> tuple[float, float]:
    """Where a run crosses the top edge for the first time, else its last point."""
    above = int(np.argmax(path.y > top))
    if path.y[above] <= top:
        return float(path.x[-1]), float(path.y[-1])
    pair = slice(max(above - 1, 0), above + 1)
    return float(np.interp(top, path.y[pair], path.x[pair])), top


def run_label(label: str, group: list[Record]) -> str:
    """How many runs are in the line, and what became of the others: "LoRA (3 seeds, 1 diverged ×)"."""
    ended = Counter(record.status for record in group)
    done = ended.pop("done", 0)
    parts = [f"{done} seed{'s' * (done != 1)}"] if done else []
    parts += [f"{n} {status.replace('_', ' ')}{' ×' * (status in FAILED)}" for status, n in sorted(ended.items())]
    return f"{label} ({', '.join(parts)})"


def memory_table(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Method -> predicted bytes by kind, and "peak"; "measured" where CUDA's peak was. The largest over its runs."""
    table: dict[str, dict[str, int]] = {}
    for method, group in stats.by_method(records).items():
        known = [record.costs for record in group if record.costs.predicted_memory]
        if known:
            table[method] = dict(max((c.predicted_memory or {} for c in known), key=lambda kinds: kinds.get("peak", 0)))
        measured = [c.costs.peak_memory_bytes for c in group if c.costs.peak_memory_bytes]
        if measured:
            table.setdefault(method, {})["measured"] = max(measured)
    return table


class Search(NamedTuple):
    """One method's learning-rate search: rates (N,), mean validation loss (N,) there, and the rates that failed."""

    rates: np.ndarray
    losses: np.ndarray
    failed: tuple[float, ...]

    @property
    def best(self) -> float | None:
        """The rate of the lowest loss; None where every rate failed."""
        return float(self.rates[self.losses.argmin()]) if len(self.rates) else None


def search_table(records: Sequence[Record]) -> dict[str, Search]:
    """Method -> its search, over records of kind lr_search; a rate fails when it failed at any seed.

    Raises:
        ParameterError: a record is of another kind.
    """
    kinds = {record.kind for record in records}
    if kinds != {"lr_search"}:
        raise ParameterError("records", sorted(kinds), "must be of kind lr_search")
    return {method: _search(group) for method, group in stats.by_method(records).items()}


def _search(group: list[Record]) -> Search:
    tried: dict[float, list[float]] = {}
    for point in (point for record in group for point in record.search):
        loss = (point.validation or {}).get("loss", np.nan)
        tried.setdefault(point.learning_rate, []).append(loss if point.status == "done" else np.nan)
    means = {rate: float(np.mean(losses)) for rate, losses in sorted(tried.items())}
    good = {rate: loss for rate, loss in means.items() if np.isfinite(loss)}
    failed = tuple(rate for rate in means if rate not in good)
    return Search(np.array([*good]), np.array([*good.values()]), failed)


def score_table(records: Sequence[Record], metric: str | None = None) -> dict[str, Score]:
    """Method -> (seed -> final value, their estimate), of the finished runs; methods without one are left out.

    Raises:
        ParameterError: no finished run has the metric.
    """
    metric = metric or stats.main_value(records)
    scores = {method: stats.finished(group, metric) for method, group in stats.by_method(records).items()}
    known = sorted({f"{split} {name}" for record in records for split, row in record.final.items() for name in row})
    require(any(scores.values()), "metric", metric, f"must be one of {', '.join(known) or '(no finished run)'}")
    return {method: (seeds, stats.estimate([*seeds.values()])) for method, seeds in scores.items() if seeds}
