"""Figures are functions of records: a `*_table` gives the numbers (`figure_data.py`), the figure only draws them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit import stats, style
from lorakit.figure_data import (
    FAILED,
    Curve,
    Path,
    Search,
    curve_table,
    exit_point,
    memory_table,
    run_label,
    score_table,
    search_table,
)
from lorakit.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "logits")  # bottom of the stack first
BAND = "line: mean; band: lowest to highest seed"


def loss_curve(records: Sequence[Record], x: str = "accepted_steps", y: str = "validation loss") -> Figure:
    """`y` against `x`: a line per method, a band over its seeds, a thin line for a run that did not finish.

    Args:
        x: accepted_steps, steps, tokens, tokens_backpropagated, flops or seconds.
        y: "validation loss", "train loss" or the name of a validation metric.
    """
    with style.context():
        drawn = style.figure(3.1)
        ax = drawn.subplots()
        _draw_curves(ax, records, x, y)
        ax.set_title(records[0].setting, loc="left")
        style.legend(drawn, *ax.get_legend_handles_labels(), title=BAND if _has_band(records) else None)
    return drawn


def _has_band(records: Sequence[Record]) -> bool:
    done = Counter(record.method for record in records if record.status == "done")
    return max(done.values(), default=0) > 1


def _draw_curves(ax: Axes, records: Sequence[Record], x: str, y: str) -> None:
    draw_table(ax, curve_table(records, x, y), stats.by_method(records))
    _label_axes(ax, x, y, empty=not ax.has_data() or not any(len(line.get_xdata()) for line in ax.lines))


def draw_table(ax: Axes, table: dict[str, Curve], groups: dict[str, list[Record]]) -> None:
    """A line per method of `table` with its band, named after how many of its runs in `groups` finished."""
    looks = style.looks(table)
    top = _limit(ax, table)
    for method, curve in table.items():
        look = looks[method]
        ax.plot(curve.x, curve.mean, color=look.color, marker=look.marker, ls=look.dash,
                markevery=style.spaced(curve.x), label=run_label(look.label, groups[method]))  # fmt: skip
        if len(curve.seeds) > 1:
            ax.fill_between(curve.x, curve.low, curve.high, color=look.color, alpha=min(0.15, 0.9 / len(table)), lw=0)
        for path in curve.unfinished:
            _draw_unfinished(ax, path, look, top)


def _limit(ax: Axes, table: dict[str, Curve]) -> float:
    """Fit y to the finished runs, so that a diverging one does not flatten them; return the top edge."""
    values = np.concatenate([part for curve in table.values() for part in (curve.low, curve.high)])
    if not len(values):
        return np.inf
    margin = 0.06 * (values.max() - values.min()) or 0.05 * abs(values.max()) or 0.05
    ax.set_ylim(values.min() - margin, values.max() + 2 * margin)
    return ax.get_ylim()[1]


def _draw_unfinished(ax: Axes, path: Path, look: style.Look, top: float) -> None:
    if not len(path.x):
        return
    ax.plot(path.x, path.y, color=look.color, ls=look.dash, lw=0.8)
    if path.status in FAILED:
        ax.plot(*exit_point(path, top), color=look.color, marker="x", ms=7, mew=1.8, clip_on=False, zorder=5)


def _label_axes(ax: Axes, x: str, y: str, empty: bool) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.set_xlabel(style.X_LABELS[x])
    ax.set_ylabel(_y_label(y))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=x not in ("flops", "seconds")))
    if x != "seconds":
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    ax.ticklabel_format(axis="y", useOffset=False)
    if empty:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "no finite values", ha="center", va="center", transform=ax.transAxes)


def _y_label(y: str) -> str:
    name = y if y == "train loss" or y.startswith("validation ") else f"validation {y}"
    return name.replace("_", " ") + (" (nats)" if name.endswith(" loss") else "")


def memory_by_kind(records: Sequence[Record]) -> Figure:
    """Predicted peak training memory of each method, stacked by kind; CUDA's measured peak as a diamond."""
    with style.context():
        drawn = style.figure(1.0 + style.rows_height(stats.by_method(records)))
        ax = drawn.subplots()
        _draw_memory(ax, records)
        ax.set_title(records[0].setting, loc="left")
        style.legend(drawn, *_memory_key(ax))
    return drawn


def _memory_key(ax: Axes) -> tuple[list[Any], list[str]]:
    """Kinds in the order of the stack, then the measurement, which matplotlib would put first."""
    handles, labels = ax.get_legend_handles_labels()
    split = sum(label.startswith("measured") for label in labels)
    return handles[split:] + handles[:split], labels[split:] + labels[:split]


def _draw_memory(ax: Axes, records: Sequence[Record]) -> None:
    table = memory_table(records)
    unit, size = _unit(table)
    kinds = [kind for kind in MEMORY_KINDS if any(kind in row for row in table.values())]
    kinds += sorted({kind for row in table.values() for kind in row} - {*MEMORY_KINDS, "peak", "measured"})
    left = np.zeros(len(table))
    for kind, color in zip(kinds, style.shades(len(kinds)), strict=True):
        width = np.array([row.get(kind, 0) for row in table.values()]) / size
        ax.barh(range(len(table)), width, 0.62, left, color=color, edgecolor="white", lw=0.6, label=kind)
        left += width
    _mark_peaks(ax, table, left, size)
    style.list_methods(ax, list(table))
    ax.set_xlabel(f"memory at the peak of a training step, predicted ({unit})")
    if not table:
        ax.text(0.5, 0.5, "no prediction recorded", ha="center", va="center", transform=ax.transAxes)


def _unit(table: dict[str, dict[str, int]]) -> tuple[str, float]:
    largest = max((value for row in table.values() for value in row.values()), default=0)
    return ("GiB", 2.0**30) if largest >= 2**32 else ("MiB", 2.0**20) if largest >= 2**20 else ("KiB", 2.0**10)


def _mark_peaks(ax: Axes, table: dict[str, dict[str, int]], ends: np.ndarray, size: float) -> None:
    measured = {place: row["measured"] / size for place, row in enumerate(table.values()) if "measured" in row}
    if measured:
        ax.plot([*measured.values()], [*measured], "D", color="#D55E00", mec="black", ms=6, label="measured (CUDA)")
    for place, row in enumerate(table.values()):
        end = (max(ends[place], measured.get(place, 0)), place)
        ax.annotate(_peak_text(row, size), end, (7, 0), textcoords="offset points", va="center", size=8)
    ax.margins(x=0.32 if measured else 0.1)


def _peak_text(row: dict[str, int], size: float) -> str:
    names = {"peak": "", "measured": "measured "}
    return ", ".join(f"{text}{row[key] / size:.3g}" for key, text in names.items() if key in row)


def learning_rate_search(records: Sequence[Record]) -> Figure:
    """Validation loss against learning rate at equal budget: the best starred, failed rates at the top edge."""
    table = search_table(records)
    looks = style.looks(table)
    with style.context():
        drawn = style.figure(3.1)
        ax = drawn.subplots()
        ax.set_xscale("log")
        for place, (method, search) in enumerate(table.items()):
            _draw_search(ax, search, looks[method], 1 - 0.06 * place)
        ax.margins(y=0.08 + 0.06 * len(table))
        ax.set(xlabel="learning rate", ylabel="validation loss (nats)")
        ax.set_title(records[0].setting, loc="left")
        style.legend(drawn, *ax.get_legend_handles_labels(), title="star: best; × at the top: diverged or failed")
    return drawn


def _draw_search(ax: Axes, search: Search, look: style.Look, height: float) -> None:
    """Draw one method; `height` (share of the axes) keeps failed rates of several methods apart."""
    label = look.label if search.best is None else f"{look.label} (best {search.best:.1e})"
    ax.plot(search.rates, search.losses, color=look.color, marker=look.marker, ls=look.dash, label=label)
    if search.best is not None:
        ax.plot(search.best, search.losses.min(), "*", color=look.color, ms=13, mec="white", mew=0.6, zorder=5)
    if len(search.failed) == 0:
        return  # an empty line that is not clipped has an extent all the same, and takes room in the layout
    edge = ax.get_xaxis_transform()  # x in data, y in axes
    heights = [height] * len(search.failed)
    ax.plot(search.failed, heights, "x", color=look.color, ms=7, mew=1.8, transform=edge, clip_on=False)


def final_scores(records: Sequence[Record], metric: str | None = None) -> Figure:
    """A final metric of each method: a point per seed, the mean and, from three seeds on, its 95 % interval.

    Args:
        metric: "test accuracy", "validation loss", … (test if unsaid); by default what the task is judged by.
    """
    metric = stats.named(metric or stats.main_value(records))
    table = score_table(records, metric)
    looks = style.looks(table)
    with style.context():
        drawn = style.figure(1.0 + style.rows_height(table))
        ax = drawn.subplots()
        for place, (method, (seeds, mean)) in enumerate(table.items()):
            _draw_scores(ax, place, seeds, mean, looks[method])
        style.list_methods(ax, list(table))
        ax.ticklabel_format(axis="x", useOffset=False)
        ax.set_xlabel(metric.replace("_", " ") + (" (nats)" if metric.endswith(" loss") else ""))
        ax.set_title(records[0].setting, loc="left")
        style.legend(drawn, *_score_key())
    return drawn


def _draw_scores(ax: Axes, place: int, seeds: dict[int, float], mean: stats.Estimate, look: style.Look) -> None:
    ax.plot([*seeds.values()], [place + 0.14] * len(seeds), look.marker, color=look.color, mfc="none", alpha=0.8)
    ax.plot(mean.mean, place - 0.14, look.marker, color=look.color, ms=7)
    if mean.low is not None:
        ax.plot([mean.low, mean.high], [place - 0.14] * 2, color=look.color, marker="|", ms=7, lw=1.4)


def _score_key() -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    seed = Line2D([], [], color="0.3", ls="", marker="o", mfc="none")
    mean = Line2D([], [], color="0.3", ls="-", marker="o", ms=7)
    return [mean, seed], ["mean, 95 % interval from three seeds on", "one seed"]


def overview(records: Sequence[Record]) -> Figure:
    """What a set of runs bought and cost: validation loss against accepted steps and FLOPs, and memory by kind."""
    bars = style.rows_height(stats.by_method(records))
    with style.context():
        drawn = style.figure(3.7 + bars)
        axes = drawn.subplot_mosaic("ab;cc", height_ratios=[2.4, bars])
        _draw_curves(axes["a"], records, "accepted_steps", "validation loss")
        _draw_curves(axes["b"], records, "flops", "validation loss")
        axes["b"].set_ylabel("")
        _draw_memory(axes["c"], records)
        axes["a"].set_title(records[0].setting, loc="left")
        title = BAND if _has_band(records) else None
        style.legend(drawn, *axes["a"].get_legend_handles_labels(), title=title, at="upper")
        style.legend(drawn, *_memory_key(axes["c"]))
    return drawn
