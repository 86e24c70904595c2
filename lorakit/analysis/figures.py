"""Figures are functions of records: a table gives the numbers, the figure draws them and nothing else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lorakit.analysis import names, stats, style
from lorakit.analysis.curves import BAND, draw_loss, title
from lorakit.analysis.frame import frame, require_comparable
from lorakit.errors import require
from lorakit.records import AXES, Record

MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "logits")  # bottom of the stack first


def details(record: Record, name: str) -> dict[str, Any]:
    """What only the method `name` has in `record`.

    Raises:
        ParameterError: the record has nothing of the kind.
    """
    known = ", ".join(record.details) or "none"
    require(name in record.details, "record", f"{record.setting}/{record.row}", f"has no {name!r}; it has {known}")
    return record.details[name]


@style.captioned
def loss_curve(
    records: Sequence[Record], x: str = "accepted_steps", y: str = stats.LOSS, mixed: bool = False
) -> Figure:
    """What was reached against what was spent: a line per row, a band over its seeds; thin: a run that did not finish.

    Args:
        x: accepted_steps, steps, tokens, tokens_backpropagated, flops or seconds.
        y: "validation loss", "train loss" or the name of a validation metric.
        mixed: show records of several models, tasks or data all the same; the title then says so.
    """
    with style.panel(3.1) as ax:
        title(ax, records, mixed)
        return style.legend(ax, draw_loss(ax, records, x, y))


@style.captioned
def loss_panels(records: Sequence[Record], beside: str = "lora", x: str = "accepted_steps") -> Figure:
    """A panel for each row, its band over seeds beside that of one row that stands in all: many bands would overlap."""
    require_comparable(records)
    groups = stats.by_row(records)
    rows = [row for row in groups if row != beside] or [beside]
    deep = -(-len(rows) // 3)
    with style.panel(0.6 + 1.5 * deep, 3, deep, sharey=True, squeeze=False) as axes:
        bounds = []
        for ax, row in zip(axes.flat, rows, strict=False):
            draw_loss(ax, [record for record in records if record.row in (beside, row)], x, stats.LOSS)
            bounds += ax.get_ylim()
            ax.set(title=style.wrapped(names.label(row, groups[row]), 34), xlabel="", ylabel="")
            ax.locator_params(axis="x", nbins=3)
        for ax in axes.flat[len(rows) :]:
            ax.remove()
        axes[0, 0].set_ylim(min(bounds), max(bounds))
        drawn = axes[0, 0].get_figure()
        shared = f"; in every panel: {names.label(beside, records)}" if beside in groups else ""
        drawn.suptitle(f"{records[0].setting}{shared}; {BAND}", size=9)
        drawn.supxlabel(AXES[x].label, size=9)
        drawn.supylabel(f"{stats.LOSS} (nats)", size=9)
        return drawn


# memory ----------------------------------------------------------------------------------------------


def memory_table(records: Sequence[Record]) -> pd.DataFrame:
    """Bytes by row and kind: those of its run with the largest predicted "peak", and the largest "measured" one."""
    table = frame(records).memory
    told = table["measured"].astype(bool)
    predicted, measured = table[~told], table[told]
    peaks = predicted[predicted["kind"] == "peak"]
    largest = peaks.loc[peaks.groupby("row")["bytes"].idxmax(), ["row", "seed"]]
    both = pd.concat([predicted.merge(largest), measured.assign(kind="measured")])
    kinds = [kind for kind in dict.fromkeys((*MEMORY_KINDS, *sorted(both["kind"]))) if kind in set(both["kind"])]
    return both.groupby(["row", "kind"])["bytes"].max().unstack().reindex(index=names.order(both["row"]), columns=kinds)


@style.captioned
def memory_by_kind(records: Sequence[Record], mixed: bool = False) -> Figure:
    """Predicted peak training memory of each row, stacked by kind; CUDA's measured peak as a diamond.

    Args:
        mixed: as in `loss_curve`.
    """
    with style.panel(1.0 + style.rows_height(names.labels(records).values())) as ax:
        title(ax, records, mixed)
        return style.legend(ax, key=_draw_memory(ax, records))


def _draw_memory(ax: Axes, records: Sequence[Record]) -> style.Key:
    """The bars; what their legend holds: kinds in the order of the stack, then the measurement."""
    table = memory_table(records).rename(index=names.labels(records))
    largest = 0 if table.empty else table.max(axis=None)
    unit, size = ("GiB", 2**30) if largest >= 2**32 else ("MiB", 2**20) if largest >= 2**20 else ("KiB", 2**10)
    table = table / size
    kinds = table.drop(columns=["peak", "measured"], errors="ignore").fillna(0)
    peaks = table.reindex(columns=["peak", "measured"]).rename(columns={"peak": "", "measured": "measured "})
    told = peaks.map(lambda size: f"{size:,.0f}" if size >= 100 else f"{size:.3g}", na_action="ignore")
    texts = [", ".join(f"{name}{text}" for name, text in row.dropna().items()) for _, row in told.iterrows()]
    measured = peaks["measured "]
    style.stacked(ax, kinds, texts, 0.32 if measured.notna().any() else 0.1, np.fmax(kinds.sum(axis=1), measured))
    if measured.notna().any():
        ax.plot(measured, range(len(table)), "D", color=style.COLORS[2], mec="black", ms=6, label="measured (CUDA)")
    elif table.empty:
        ax.text(0.5, 0.5, "no prediction recorded", ha="center", va="center", transform=ax.transAxes)
    ax.set_xlabel(f"memory at the peak of a training step, predicted ({unit})")
    handles, labels = ax.get_legend_handles_labels()
    split = len(labels) - len(kinds.columns)  # matplotlib puts lines before bars
    return handles[split:] + handles[:split], labels[split:] + labels[:split]


# scores ----------------------------------------------------------------------------------------------


def search_table(records: Sequence[Record]) -> pd.DataFrame:
    """Mean validation loss over seeds of each row and learning rate, missing where the rate failed at any seed.

    Raises:
        ParameterError: a record is not of kind lr_search.
    """
    kinds = sorted({record.kind for record in records})
    require(kinds == ["lr_search"], "records", kinds, "must be of kind lr_search")
    points = [(record.row, point, point.validation or {}) for record in records for point in record.search]
    tried = [(row, p.learning_rate, told.get("loss") if p.status == "done" else None) for row, p, told in points]
    table = pd.DataFrame(tried, columns=["row", "learning_rate", "loss"]).astype({"loss": float})
    return table.groupby(["row", "learning_rate"])["loss"].agg(lambda losses: losses.mean(skipna=False)).reset_index()


@style.captioned
def learning_rate_search(records: Sequence[Record], mixed: bool = False) -> Figure:
    """Validation loss against learning rate at equal budget: the best starred, failed rates at the top edge.

    Args:
        mixed: as in `loss_curve`.
    """
    table, labels = search_table(records), names.labels(records)
    best = table.loc[table.dropna().groupby("row")["loss"].idxmin()].set_index("row")
    looks = style.looks(labels)
    labels |= {row: f"{labels[row]} (best {rate:.1e})" for row, rate in best["learning_rate"].items()}
    with style.panel(3.1) as ax:
        ax.set_xscale("log")
        style.lines(ax, table.pivot(index="learning_rate", columns="row", values="loss"), looks, labels)
        for place, (row, look) in enumerate(looks.items()):
            if row in best.index:
                ax.plot(*best.loc[row], "*", color=look.color, ms=13, mec="white", mew=0.6, zorder=5)
            failed = table.loc[(table["row"] == row) & table["loss"].isna(), "learning_rate"]
            if len(failed):  # an empty line that is not clipped takes room in the layout all the same
                ax.plot(failed, [1 - 0.06 * place] * len(failed), "x", color=look.color, ms=7, mew=1.8,
                        transform=ax.get_xaxis_transform(), clip_on=False)  # fmt: skip
        ax.margins(y=0.08 + 0.06 * len(looks))
        low, top = table["loss"].min(), 1.5 * best["loss"].max()
        if table["loss"].max() > top:  # lines of rates far too high leave at the top; they would flatten all others
            ax.set_ylim(low - 0.1 * (top - low), top)
        ax.set(xlabel="learning rate", ylabel="validation loss (nats)")
        title(ax, records, mixed)
        return style.legend(ax, "star: best; × at the top: diverged or failed")


def score_table(records: Sequence[Record], metric: str) -> pd.DataFrame:
    """Row, seed and final value of every finished run.

    Raises:
        ParameterError: no finished run has the metric.
    """
    scores = {row: stats.finished(group, metric) for row, group in stats.by_row(records).items()}
    known = sorted({f"{split} {name}" for record in records for split, found in record.final.items() for name in found})
    require(any(scores.values()), "metric", metric, f"must be one of {', '.join(known) or '(no finished run)'}")
    every = [(row, seed, value) for row, found in scores.items() for seed, value in found.items()]
    return pd.DataFrame(every, columns=["row", "seed", "value"])


@style.captioned
def final_scores(records: Sequence[Record], metric: str | None = None, mixed: bool = False) -> Figure:
    """A final metric of each row: a point per seed, the mean and, from three seeds on, its 95 % interval.

    Args:
        metric: "test accuracy", "validation loss", … (test if unsaid); by default what the task is judged by.
        mixed: as in `loss_curve`.
    """
    metric = stats.named(metric or stats.main_value(records))
    table = score_table(records, metric)
    rows = [*dict.fromkeys(table["row"])]
    texts = [names.labels(records)[row] for row in rows]
    with style.panel(1.0 + style.rows_height(texts)) as ax:
        for place, (row, look) in enumerate(style.looks(rows).items()):
            draw_mean(ax, table.loc[table["row"] == row, "value"], place - 0.14, 0.28, look, upright=False)
        style.list_rows(ax, texts)
        ax.ticklabel_format(axis="x", useOffset=False)
        ax.set_xlabel(metric.replace("_", " ") + (" (nats)" if metric.endswith(" loss") else ""))
        title(ax, records, mixed)
        return style.legend(ax, key=mean_key(style.Look("0.3", "o")))


def draw_mean(ax: Axes, values: Sequence[float], place: float, beside: float, look: style.Look, upright: bool) -> None:
    """Filled, the mean of `values` at `place` with its interval; hollow, each of them, `beside` it."""
    import seaborn as sns

    values, found = np.asarray(values), stats.estimate(values)
    bounds = (np.nan, np.nan) if found.low is None else (found.low, found.high)
    across, along = "xy" if upright else "yx"
    mean, seeds = ({across: np.full(len(values), at), along: values} for at in (place, place + beside))
    sns.pointplot(**mean, errorbar=lambda _: bounds, color=look.color, marker=look.marker, markersize=7, mew=0.8, ax=ax,
                  err_kws={"lw": 1.4}, orient=across, native_scale=True)  # fmt: skip
    sns.scatterplot(**seeds, marker=look.marker, s=20, ax=ax, legend=False, fc="none", ec=look.color, lw=0.9, alpha=0.8)


def mean_key(look: style.Look) -> style.Key:
    """The legend of `draw_mean`."""
    mean = Line2D([], [], color=look.color, marker=look.marker, ms=7)
    seed = Line2D([], [], color=look.color, ls="", marker=look.marker, mfc="none")
    return [mean, seed], ["mean, 95 % interval from three seeds on", "one seed"]


@style.captioned
def overview(records: Sequence[Record], mixed: bool = False) -> Figure:
    """What a set of runs bought and cost: validation loss against accepted steps and FLOPs, and memory by kind.

    Args:
        mixed: as in `loss_curve`.
    """
    bars = style.rows_height(names.labels(records).values())
    with style.context():
        axes = style.figure(3.7 + bars).subplot_mosaic("ab;cc", height_ratios=[2.4, bars])
        title(axes["a"], records, mixed)
        band = draw_loss(axes["a"], records, "accepted_steps", stats.LOSS)
        draw_loss(axes["b"], records, "flops", stats.LOSS)
        axes["b"].set_ylabel("")
        style.legend(axes["a"], band, at="upper")
        return style.legend(axes["c"], key=_draw_memory(axes["c"], records))
