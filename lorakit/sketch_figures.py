"""Figures of how good the sketches are; `sketch_tables` has the numbers behind each, the figure only draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorakit import style
from lorakit.sketch_tables import Cosines, Spectra, error_table, rank_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sketch_error(cosines: Cosines) -> Figure:
    """The error of a sketched cosine against m, under its bound."""
    table = error_table(cosines)
    sizes = list(table)
    error, bound = zip(*table.values(), strict=True)
    with style.context():
        drawn = style.figure(2.8)
        ax = drawn.subplots()
        ax.plot(sizes, bound, color="0.4", ls=style.DASHES[1], label="bound: √((2 + 3²) / m)")
        ax.plot(sizes, error, color=style.COLORS[1], marker="o", label="measured")
        ax.set(xlabel="size of the sketch, m", ylabel="rms error of a cosine", xscale="log", yscale="log")
        ax.set_ylim(min(error) / 1.4, max(bound) * 1.4)
        style.plain_ticks(
            ax.yaxis, [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if min(error) <= tick <= max(bound)]
        )
        style.plain_ticks(ax.xaxis, sizes)
        style.legend(drawn, *ax.get_legend_handles_labels())
    return drawn


def agreement(cosines: Cosines, size: int) -> Figure:
    """Left: sketched against exact cosines at m = `size`, first seed. Right: their rank correlation against m."""
    ranks = rank_table(cosines)
    sizes = list(ranks)
    with style.context():
        drawn = style.figure(3.0)
        left, right = drawn.subplots(1, 2)
        left.axline((0, 0), slope=1, color="0.4", lw=0.9)
        left.plot(cosines.exact, cosines.sketched[size][0], "o", ms=2.5, color=style.COLORS[1], alpha=0.6)
        left.set(xlabel="exact cosine", ylabel=f"sketched, m = {size:,}")
        left.set_title("a point: two batches", loc="left")
        low, high = (np.array([pick(values) for values in ranks.values()]) for pick in (min, max))
        right.fill_between(sizes, low, high, color=style.COLORS[1], alpha=0.2, lw=0)
        right.plot(sizes, [np.mean(values) for values in ranks.values()], color=style.COLORS[1], marker="o")
        right.set(xlabel="size of the sketch, m", ylabel="Spearman's correlation", xscale="log", ylim=(None, 1))
        right.set_title("band: lowest to highest seed", loc="left")
        style.plain_ticks(right.xaxis, sizes)
    return drawn


def sparse_errors(table: Mapping[str, Sequence[float]], topks: Sequence[int]) -> Figure:
    """`sparse_table` against K."""
    with style.context():
        drawn = style.figure(2.8)
        ax = drawn.subplots()
        for place, (name, errors) in enumerate(table.items(), 1):
            ax.plot(topks, errors, color=style.COLORS[place], marker=style.MARKERS[place], ls=style.DASHES[place],
                    label=name)  # fmt: skip
        ax.set(xlabel="words kept per token, K", ylabel="relative error of the gradient", xscale="log", yscale="log")
        style.plain_ticks(ax.xaxis, topks)
        style.legend(drawn, *ax.get_legend_handles_labels())
    return drawn


def captured_energy(table: Mapping[str, np.ndarray], window: int) -> Figure:
    """`captured_table`, each value the mean over the `window` rows before and at it."""
    with style.context():
        drawn = style.figure(3.0)
        ax = drawn.subplots()
        for place, (name, captured) in enumerate(table.items()):
            smooth = np.convolve(captured, np.ones(window) / window, mode="valid")
            steps = np.arange(window, len(captured) + 1)
            ax.plot(steps, smooth, color=style.COLORS[place], marker=style.MARKERS[place], ls=style.DASHES[place],
                    markevery=style.spaced(steps), label=name)  # fmt: skip
        ax.set(xlabel="rows seen", ylabel="share of the next row captured", ylim=(0, 1))
        ax.set_title(f"mean over {window} rows", loc="left")
        style.legend(drawn, *ax.get_legend_handles_labels())
    return drawn


def spectrum(spectra: Spectra) -> Figure:
    """Left: energy by direction, of the stream and of the sketch. Right: the error and its bound for every k."""
    rows = len(spectra.sketch)
    with style.context():
        drawn = style.figure(3.0)
        left, right = drawn.subplots(1, 2)
        for place, (name, energy) in enumerate({"stream": spectra.stream, "sketch": spectra.sketch}.items()):
            places = np.arange(1, len(energy) + 1)
            left.plot(places, energy, color=style.COLORS[place], marker=style.MARKERS[place], ls=style.DASHES[place],
                      markevery=style.spaced(places), label=name)  # fmt: skip
        left.set(xlabel="singular direction, largest first", ylabel="share of the energy", ylim=(0, None))
        left.legend()
        right.plot(range(rows), spectra.bounds, color="0.4", ls=style.DASHES[1], marker=".", label="bound by k")
        right.axhline(spectra.error, color=style.COLORS[1], label="measured")
        right.set(xlabel="k", ylabel="error over ‖A‖²", ylim=(0, None))
        right.set_xticks(range(0, rows, max(1, rows // 5)))
        right.legend()
    return drawn
