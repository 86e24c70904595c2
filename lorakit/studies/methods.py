"""What the notebook of one adapter method asks: zeros (sparse LoRA), spectra (HiRA), bits (QLoRA), skipped layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorakit.analysis import names, style
from lorakit.analysis.figures import details
from lorakit.records import Record

LOWEST = 1e-9  # what is zero but for rounding lies on the lower edge


# Sparse LoRA: when zeros appear, how many there are in the end, and what they save on disk


@style.captioned
def zeros_over_time(records: Sequence[Record]) -> Figure:
    """The share of zeros that was asked for (thin) and that was reached, against optimizer steps, a line per run."""
    seeds, rows = {r.seed for r in records}, style.looks(r.row for r in records)
    runs = {names.label(r.row, [r]) + f", seed {r.seed}" * (len(seeds) > 1): r for r in records}
    looks = {run: rows[r.row] for run, r in runs.items()}
    history = [(run, *point) for run, r in runs.items() for point in details(r, "sparsity")["history"]]
    # NaN: no schedule asks
    table = pd.DataFrame(history, columns=["run", "step", "asked", "reached"]).astype({"asked": float})
    with style.panel(2.8) as ax:
        style.lines(ax, table.pivot_table("reached", "step", "run", aggfunc="last"), looks)
        for run, asked in table.dropna().groupby("run"):
            ax.plot(asked["step"], asked["asked"], color=looks[run].color, lw=0.8, alpha=0.6)
        ax.set(xlabel="optimizer steps", ylabel="share of zeros", ylim=(-0.02, None), title=records[0].setting)
        return style.legend(ax, "thin line: the schedule")


def zeros(record: Record) -> dict[str, float]:
    """Share of zeros in A, B, their product BA and the merged weight; sizes of kinds of files over the dense one's."""
    found = details(record, "sparsity")
    shares = {name: found["zeros"][name] for name in ("A", "B", "BA", "merged")}
    sizes = {name: found["bytes"][name] / found["bytes"]["dense"] for name in ("packed", "compacted")}
    return shares | {f"{name} / dense bytes": size for name, size in sizes.items()}


# HiRA: the spectrum of its update, which ends at no rank, next to LoRA's, which does


@style.captioned
def spectrum(updates: Mapping[str, Any], rank: int) -> Figure:
    """Singular values of each row's update matrix ΔW over the largest; the rank r of the factors is marked.

    Args:
        updates: row -> ΔW, (out, in).
    """
    sigmas = {row: torch.linalg.svdvals(torch.as_tensor(update).double()).numpy() for row, update in updates.items()}
    table = pd.DataFrame({row: pd.Series(sigma / sigma[0]) for row, sigma in sigmas.items()}).clip(lower=LOWEST)
    table.index += 1
    with style.panel(2.8) as ax:
        style.lines(ax, table, style.looks(updates), labels={row: names.label(row) for row in updates})
        ax.axvline(rank, color="0.4", lw=0.9, ls=":")
        ax.annotate(f"r = {rank}", (rank, 5e-10), (-4, 4), textcoords="offset points", ha="right", size=8)
        ax.set(xlabel="singular value, largest first", ylabel="size over the largest", yscale="log", ylim=(5e-10, 2))
        return style.legend(ax)


# QLoRA: NF4's 16 values under the weights they stand for, and where a quantized model's bits go


@style.captioned
def codebook(weights: Any, codes: Sequence[float]) -> Figure:
    """A histogram of weights over their block's largest, (N,) in [-1, 1], and the 16 values NF4 rounds them to."""
    with style.panel(2.6) as ax:
        for place, code in enumerate(codes):
            ax.axvline(code, color=style.COLORS[2], lw=1.0, label="NF4's 16 values" if place == 0 else None)
        ax.hist(np.asarray(weights), 81, range=(-1, 1), density=True, color=style.COLORS[5], lw=0, label="weights")
        ax.set(xlabel="weight over the largest of its block of 64", ylabel="density", xlim=(-1.04, 1.04))
        return style.legend(ax)


@style.captioned
def weight_bytes(tables: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bits a parameter costs, over all parameters of the model, stacked by the kind of weight they go to.

    Args:
        tables: name of a model -> its `measure.weights.weight_table`.
    """
    rows = {name: pd.DataFrame(table["rows"]).set_index("kind") for name, table in tables.items()}
    bits = {name: 8 * one["bytes"] / one["parameters"].sum() for name, one in rows.items()}
    table = pd.concat(bits, axis=1).fillna(0).T
    with style.panel(1.0 + style.rows_height(tables)) as ax:
        style.stacked(ax, table, [f"{total:.1f}" for total in table.sum(axis=1)], 0.1)
        ax.set_xlabel("bits per parameter of the whole model")
        return style.legend(ax)


# SkipLoRA: of every adapter, how much it changes what passes through it, and how often it was trained


@style.captioned
def skip_map(record: Record) -> Figure:
    """Adapters by optimizer step, the first at the bottom. Left: M = ‖Δh‖ / ‖h‖, how much each changes what passes
    through it, missing before it was measured. Right: the share of steps it was trained in.
    """
    found = details(record, "skip")
    history, adapters, blocks = found["history"], found["adapters"], found["blocks"]
    measured = [row or [np.nan] * len(adapters) for row in history["metric"]]
    metric, active = (pd.DataFrame(m, history["step"], adapters, float).T for m in (measured, history["active"]))
    with style.panel(1.6 + 0.055 * len(blocks), 2, sharey=True) as (left, right):
        # one large adapter would leave no colour to the others
        _heat(left, metric, "M of each adapter", "viridis", np.nanquantile(metric, 0.97))
        _heat(right, active, "share of steps trained", "cividis", 1)
        starts = [n for n, block in enumerate(blocks) if n == 0 or block != blocks[n - 1]]
        left.set_yticks(starts, [str(blocks[n]) for n in starts])
        left.set(ylabel="block", title=record.setting)
        return left.get_figure()


def _heat(ax: Axes, table: pd.DataFrame, label: str, colors: str, highest: float) -> None:
    import seaborn as sns

    bar = {"location": "top", "label": label, "shrink": 0.9, "aspect": 30,
           "extend": "max" if np.nanmax(table) > highest else "neither"}  # fmt: skip
    sns.heatmap(table, ax=ax, cmap=colors, vmin=0, vmax=highest, cbar_kws=bar, xticklabels=False, yticklabels=False)
    ax.invert_yaxis()
    ax.grid(visible=False)
    steps = range(0, len(table.columns), max(1, -(-len(table.columns) // 6)))
    ax.set_xticks([n + 0.5 for n in steps], [f"{table.columns[n]:g}" for n in steps], rotation=0)
    ax.set_xlabel("optimizer steps")
