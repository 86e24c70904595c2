"""Curves over seeds: loss against what a run spends, or anything that a run logs by step."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from lorakit.analysis import names, stats, style
from lorakit.analysis.frame import frame, require_comparable
from lorakit.errors import require
from lorakit.records import AXES, Record

FAILED = ("diverged", "out_of_memory", "failed")
BAND = "line: mean; band: lowest to highest seed"


def title(ax: Axes, records: Sequence[Record], mixed: bool = False) -> None:
    """Name the setting; records of several models, tasks or data are refused, or, if `mixed`, the title says so."""
    told = require_comparable(records, mixed)
    ax.set_title(style.wrapped(records[0].setting + (f" ({told})" if told else ""), 95))


def curve_points(records: Sequence[Record], x: str = "accepted_steps", y: str = stats.LOSS) -> pd.DataFrame:
    """The finite points of every run: row, seed, status, x ascending, y. Of several at one x the last one counts.

    Raises:
        ParameterError: `x` is no axis, or `y` is in none of the records while others are.
    """
    table, y = frame(records).curves, stats.named(y, "validation")
    known = {name for name in table if name.startswith(("train ", "validation ")) and table[name].notna().any()}
    told = f"must be one of {', '.join(sorted(known))}"
    require(not known or y in known | {stats.LOSS}, "y", y.removeprefix("validation "), told)
    points = [(r.row, r.seed, r.status, *point) for r in records for point in zip(*stats.curve(r, x, y), strict=True)]
    return pd.DataFrame(points, columns=["row", "seed", "status", "x", "y"]).sort_values(["row", "seed", "x"])


def over_seeds(points: pd.DataFrame) -> pd.DataFrame:
    """A line per row and x: mean, low and high of y over the row's finished runs, and how many they are.

    Runs are put on all their x together, between them in line, within the range every one of them covers.

    Args:
        points: row, seed, status, x ascending, y.
    """
    parts = []
    for row, done in points[points["status"] == "done"].groupby("row", sort=False):
        runs = done.pivot_table(index="x", columns="seed", values="y", aggfunc="last")
        runs = runs.interpolate("index", limit_area="inside").dropna()  # (N, seeds)
        told = {"row": row, "mean": runs.mean(axis=1), "low": runs.min(axis=1), "high": runs.max(axis=1)}
        parts.append(pd.DataFrame(told | {"seeds": runs.shape[1]}).reset_index())
    return pd.concat(parts or [pd.DataFrame(columns=["x", "row", "mean", "low", "high", "seeds"])], ignore_index=True)


def draw_loss(ax: Axes, records: Sequence[Record], x: str, y: str) -> str | None:
    """`y` against `x` of `records`; what the band is, if there is one."""
    band, name = draw_curves(ax, curve_points(records, x, y), records), stats.named(y, "validation")
    ax.set(xlabel=AXES[x].label, ylabel=name.replace("_", " ") + (" (nats)" if name.endswith(" loss") else ""))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=x not in ("flops", "seconds")))
    if x != "seconds":
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    ax.ticklabel_format(axis="y", useOffset=False)
    if not any(len(line.get_xdata()) for line in ax.lines):
        ax.set_xticks([])
        ax.tick_params(left=False, labelleft=False)  # its own: others may share the scale
        ax.text(0.5, 0.5, "no finite values", ha="center", va="center", transform=ax.transAxes)
    return band


def draw_curves(ax: Axes, points: pd.DataFrame, records: Sequence[Record]) -> str | None:
    """A line per row of `records` from its `points`, named after how its runs ended; what the band is, if any."""
    groups, table = stats.by_row(records), over_seeds(points)
    looks, top = style.looks(groups), np.inf
    if not table.empty:  # fit y to the finished runs, so that a diverging one does not flatten them
        low, high = table["low"].min(), table["high"].max()
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        _, top = ax.set_ylim(low - margin, high + 2 * margin)
    labels = {row: run_label(row, group) for row, group in groups.items()}
    style.lines(ax, table.pivot(index="x", columns="row", values="mean"), looks, labels)
    for row, look in looks.items():
        if len(band := table[(table["row"] == row) & (table["seeds"] > 1)]):
            ax.fill_between("x", "low", "high", data=band, color=look.color, alpha=min(0.15, 0.9 / len(looks)), lw=0)
    for (row, _, status), run in points[points["status"] != "done"].groupby(["row", "seed", "status"], sort=False):
        ax.plot(run["x"], run["y"], lw=0.8, label="_", **looks[row].line | {"marker": ""})
        if status in FAILED:
            end = exit_point(run["x"].to_numpy(), run["y"].to_numpy(), top)
            ax.plot(*end, color=looks[row].color, marker="x", ms=7, mew=1.8, clip_on=False, zorder=5)
    return BAND if (table["seeds"] > 1).any() else None


def exit_point(x: np.ndarray, y: np.ndarray, top: float) -> tuple[float, float]:
    """Where a run, x and y (N,), crosses the top edge for the first time, else its last point."""
    place = stats.crossing(x, y, top)
    return (float(x[-1]), float(y[-1])) if place is None else (place, top)


def run_label(row: str, group: Sequence[Record]) -> str:
    """How many runs are in the line, and what became of the others: "LoRA (3 seeds, 1 diverged ×)"."""
    ended = Counter(record.status for record in group)
    done = ended.pop("done", 0)
    parts = [f"{done} seed{'s' * (done != 1)}"] if done else []
    parts += [f"{n} {status.replace('_', ' ')}{' ×' * (status in FAILED)}" for status, n in sorted(ended.items())]
    return f"{names.label(row, group)} ({', '.join(parts)})"
