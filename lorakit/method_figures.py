"""Figures about one method alone: when zeros appear, which layers were skipped, an update's spectrum, NF4's codes.

As in `figures`, a `*_table` or the record holds the numbers and the figure only draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit import style
from lorakit.errors import require
from lorakit.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def details(record: Record, name: str) -> dict[str, Any]:
    """What only the method `name` has in `record`.

    Raises:
        ParameterError: the record has nothing of the kind.
    """
    known = ", ".join(record.details) or "none"
    require(name in record.details, "record", f"{record.setting}/{record.method}", f"has no {name!r}; it has {known}")
    return record.details[name]


# Sparse LoRA ----------------------------------------------------------------------------------------


def zeros_over_time(records: Sequence[Record]) -> Figure:
    """The share of zeros that was asked for (thin) and that was reached, against optimizer steps, a line per run."""
    looks = style.looks(record.method for record in records)
    with style.context():
        drawn = style.figure(2.8)
        ax = drawn.subplots()
        for record in records:
            history, look = details(record, "sparsity")["history"], looks[record.method]
            steps, target, reached = zip(*history, strict=True)
            ax.plot(steps, reached, color=look.color, marker=look.marker, ls=look.dash, label=look.label,
                    markevery=style.spaced(steps))  # fmt: skip
            if None not in target:
                ax.plot(steps, target, color=look.color, lw=0.8, alpha=0.6)
        ax.set(xlabel="optimizer steps", ylabel="share of zeros")
        ax.set_ylim(-0.02, None)
        ax.set_title(records[0].setting, loc="left")
        style.legend(drawn, *ax.get_legend_handles_labels(), title="thin line: the schedule")
    return drawn


def zeros_table(record: Record) -> dict[str, float]:
    """Share of zeros in A, B, their product BA and the merged weight; sizes of kinds of files over the dense one's."""
    found = details(record, "sparsity")
    sizes = found["bytes"]
    return {
        **{name: found["zeros"][name] for name in ("A", "B", "BA", "merged")},
        **{f"{name} / dense bytes": sizes[name] / sizes["dense"] for name in ("packed", "compacted")},
    }


# HiRA -----------------------------------------------------------------------------------------------


def spectrum(updates: Mapping[str, Any], rank: int) -> Figure:
    """Singular values of each update matrix ΔW, (out, in), largest first, over its largest; the rank r is marked.

    Args:
        updates: method -> ΔW.
        rank: r of the factors.
    """
    import torch

    looks = style.looks(updates)
    with style.context():
        drawn = style.figure(2.8)
        ax = drawn.subplots()
        for method, update in updates.items():
            sigma = torch.linalg.svdvals(torch.as_tensor(update).double()).numpy()
            sigma = np.maximum(sigma / sigma[0], 1e-9)  # what is zero but for rounding lies on the lower edge
            places, look = np.arange(1, len(sigma) + 1), looks[method]
            ax.plot(places, sigma, color=look.color, marker=look.marker, ls=look.dash, label=look.label,
                    markevery=style.spaced(places))  # fmt: skip
        ax.axvline(rank, color="0.4", lw=0.9, ls=":")
        ax.annotate(f"r = {rank}", (rank, 5e-10), (-4, 4), textcoords="offset points", ha="right", size=8)
        ax.set(xlabel="singular value, largest first", ylabel="size over the largest", yscale="log", ylim=(5e-10, 2))
        style.legend(drawn, *ax.get_legend_handles_labels())
    return drawn


# QLoRA ----------------------------------------------------------------------------------------------


def codebook(weights: Any, codes: Sequence[float]) -> Figure:
    """A histogram of weights over their block's largest, (N,) in [-1, 1], and the 16 values NF4 rounds them to."""
    with style.context():
        drawn = style.figure(2.6)
        ax = drawn.subplots()
        ax.hist(np.asarray(weights), bins=81, range=(-1, 1), density=True, color="#56B4E9", label="weights")
        for place, code in enumerate(codes):
            ax.axvline(code, color="#D55E00", lw=1.0, label="NF4's 16 values" if place == 0 else None)
        ax.set(xlabel="weight over the largest of its block of 64", ylabel="density", xlim=(-1.04, 1.04))
        style.legend(drawn, *ax.get_legend_handles_labels())
    return drawn


def weight_bytes(tables: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bits a parameter costs, averaged over the whole model, stacked by what kind of weight they go to.

    Args:
        tables: name of a model -> its `measure.weights.weight_table`.
    """
    kinds = list(dict.fromkeys(row["kind"] for table in tables.values() for row in table["rows"]))
    with style.context():
        drawn = style.figure(1.0 + 0.34 * len(tables))
        ax = drawn.subplots()
        left = np.zeros(len(tables))
        totals = [sum(row["parameters"] for row in table["rows"]) for table in tables.values()]
        for kind, color in zip(kinds, style.shades(len(kinds)), strict=True):
            bits = [sum(8 * row["bytes"] for row in t["rows"] if row["kind"] == kind) for t in tables.values()]
            width = np.array(bits) / np.array(totals)
            ax.barh(range(len(tables)), width, 0.62, left, color=color, edgecolor="white", lw=0.6, label=kind)
            left += width
        for place, total in enumerate(left):
            ax.annotate(f"{total:.1f}", (total, place), (7, 0), textcoords="offset points", va="center", size=8)
        ax.set_yticks(range(len(tables)), list(tables))
        ax.set_ylim(len(tables) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.1)
        ax.set_xlabel("bits per parameter of the whole model")
        style.legend(drawn, *ax.get_legend_handles_labels())
    return drawn


# SkipLoRA -------------------------------------------------------------------------------------------


def skip_map(record: Record) -> Figure:
    """Of every adapter over time: M = ‖Δh‖ / ‖h‖ (left) and the share of steps it was trained (right)."""
    found = details(record, "skip")
    history, count = found["history"], len(found["adapters"])
    metric = np.array([row or [np.nan] * count for row in history["metric"]], dtype=float).reshape(-1, count)
    active = np.array(history["active"], dtype=float).reshape(-1, count)
    with style.context():
        drawn = style.figure(1.6 + 0.055 * count)
        left, right = drawn.subplots(1, 2, sharey=True)
        _heat(drawn, left, metric.T, history["step"], "M of each adapter", "viridis", None)
        _heat(drawn, right, active.T, history["step"], "share of steps trained", "cividis", (0, 1))
        ends = [place for place in range(count) if place == 0 or found["blocks"][place] != found["blocks"][place - 1]]
        left.set_yticks([place - 0.5 for place in ends], [str(found["blocks"][place]) for place in ends])
        left.set_ylabel("block")
        left.set_title(record.setting, loc="left")
    return drawn


def _heat(
    drawn: Figure, ax: Axes, values: np.ndarray, steps: Sequence[int], label: str, colors: str, limits: Any
) -> None:
    """(adapters, points) as colours, the first adapter at the bottom."""
    low, high = limits or (0, np.nanquantile(values, 0.97))  # one large adapter would leave no colour to the others
    cut = np.nanmax(values) > high
    edges = (0, steps[-1], -0.5, len(values) - 0.5)
    image = ax.imshow(values, aspect="auto", origin="lower", extent=edges, cmap=colors, vmin=low, vmax=high,
                      interpolation="nearest")  # fmt: skip
    ax.grid(visible=False)
    ax.set_xlabel("optimizer steps")
    drawn.colorbar(image, ax=ax, location="top", label=label, shrink=0.9, aspect=30, extend="max" if cut else "neither")
