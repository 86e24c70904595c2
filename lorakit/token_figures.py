"""Figures about chosen tokens; `token_tables` and `token_costs` have the numbers, a figure only draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit import style
from lorakit.token_costs import Cost, mode_table
from lorakit.token_tables import Estimate, Piece, Truncation, correlations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DONE = {0: "not run", 1: "forward only", 2: "forward and backward"}
FILLS = ("white", "#BFD7EA", "#0072B2")
LINE = 62  # characters of a text in a row of the picture
MODE_LOOKS = {"gather": ("#D55E00", "s", style.DASHES[1]), "fractional": ("#0072B2", "o", style.DASHES[0])}


def modes(tokens: int = 12, chosen: Sequence[int] = (3, 7), layers: int = 4) -> Figure:
    """What each layer does with each token: in the plain step, in mode "gather", in the two passes of "fractional"."""
    from matplotlib.patches import Patch

    table = mode_table(tokens, chosen, layers)
    with style.context():
        drawn = style.figure(1.3)
        for ax, (name, done) in zip(drawn.subplots(1, len(table)), table.items(), strict=True):
            for (row, column), what in np.ndenumerate(done):
                ax.add_patch(_box(column, row, FILLS[int(what)], "0.6", 0.5))
            ax.set(xlim=(-0.7, tokens - 0.3), ylim=(-0.7, layers + 0.7), aspect="equal", xticks=[], yticks=[])
            ax.set_title(name, loc="left")
            ax.set_xlabel("tokens")
            for side in ax.spines.values():
                side.set_visible(False)
        drawn.axes[0].set_yticks(range(layers + 1), [*(f"layer {n + 1}" for n in range(layers)), "head"])
        drawn.axes[0].tick_params(length=0)
        keys = [Patch(fc=fill, ec="0.6", label=what) for fill, what in zip(FILLS, DONE.values(), strict=True)]
        style.legend(drawn, keys, [*DONE.values()])
    return drawn


def _box(column: float, row: float, fill: Any, edge: Any, width: float, size: float = 0.84) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - size / 2, row - size / 2), size, size, fc=fill, ec=edge, lw=width)


def sketch_ranks(exact: np.ndarray, sketched: Mapping[int, np.ndarray], size: int) -> Figure:
    """`rank_table`. Left: sketched against exact scores at m = `size`, first seed. Right: their ranks against m."""
    ranks = correlations(exact, sketched)
    with style.context():
        drawn = style.figure(3.0)
        left, right = drawn.subplots(1, 2)
        left.axline((0, 0), slope=1, color="0.4", lw=0.9)
        left.plot(exact, sketched[size][0], "o", ms=2.5, color=style.COLORS[1], alpha=0.5)
        left.set(xlabel="exact score ‖h‖·‖e‖", ylabel=f"sketched, m = {size:,}", xlim=(0, None), ylim=(0, None))
        left.set_title("a point: a prediction", loc="left")
        low, high = (np.array([pick(values) for values in ranks.values()]) for pick in (min, max))
        right.fill_between([*ranks], low, high, color=style.COLORS[1], alpha=0.2, lw=0)
        right.plot([*ranks], [np.mean(values) for values in ranks.values()], color=style.COLORS[1], marker="o")
        right.set(xlabel="size of the sketch, m", ylabel="Spearman's correlation", xscale="log")
        right.set_ylim(1 - 1.05 * (1 - min(low)), 1 + 0.03 * (1 - min(low)))
        right.set_title("band: lowest to highest seed", loc="left")
        style.plain_ticks(right.xaxis, [*ranks])
    return drawn


def label_overlap(table: Mapping[str, Sequence[float]], topks: Sequence[int]) -> Figure:
    """`label_table` against the words kept."""
    with style.context():
        drawn = style.figure(2.6)
        ax = drawn.subplots()
        for place, (name, right) in enumerate(table.items(), 1):
            ax.plot(topks, right, color=style.COLORS[place], marker=style.MARKERS[place], ls=style.DASHES[place],
                    label=name)  # fmt: skip
        ax.set(xlabel="words kept per prediction, topk_logits", ylabel="rightly chosen", xscale="log", ylim=(0, 1.04))
        style.plain_ticks(ax.xaxis, topks)
        style.legend(drawn, *ax.get_legend_handles_labels())
    return drawn


def text(pictures: Mapping[str, Sequence[Piece]]) -> Figure:
    """A text per entry of `pictures`, token by token: the darker, the larger the score; chosen tokens framed."""
    from matplotlib.patches import Patch

    rows = {name: _wrapped(pieces) for name, pieces in pictures.items()}
    heights = [len(lines) for lines in rows.values()]
    with style.context():
        drawn = style.figure(0.3 * len(rows) + 0.2 * sum(heights) + 0.1)
        axes = np.atleast_1d(drawn.subplots(len(rows), 1, height_ratios=heights))
        for ax, (name, lines) in zip(axes, rows.items(), strict=True):
            scores = [piece.score for piece in pictures[name] if piece.score is not None]
            for row, line in enumerate(lines):
                _draw_line(ax, row, line, max(scores, default=1.0) or 1.0)
            ax.set(xlim=(-0.3, LINE + 0.3), ylim=(len(lines) - 0.4, -0.6))
            ax.axis("off")
            ax.set_title(name, loc="left", pad=4)
        frame = Patch(fc="none", ec="#D55E00", lw=1.6)
        keys = [Patch(fc=_shade(1.0), ec="none"), Patch(fc="0.93", ec="none"), frame]
        style.legend(drawn, keys, ["largest score", "nothing is predicted", "chosen"])
    return drawn


def _wrapped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    lines: list[list[Piece]] = [[]]
    for piece in pieces:
        if sum(len(other.text) for other in lines[-1]) + len(piece.text) > LINE:
            lines.append([])
        lines[-1].append(piece)
    return lines


def _draw_line(ax: Axes, row: int, line: Sequence[Piece], top: float) -> None:
    from matplotlib.patches import Rectangle

    start = 0
    for piece in line:
        share = None if piece.score is None else piece.score / top
        fill = "0.93" if share is None else _shade(share)
        ax.add_patch(Rectangle((start + 0.03, row - 0.42), len(piece.text) - 0.06, 0.84, fc=fill, ec="none"))
        if piece.chosen:
            ax.add_patch(Rectangle((start + 0.06, row - 0.42), len(piece.text) - 0.12, 0.84, fc="none", ec="#D55E00",
                                   lw=1.6, zorder=3))  # fmt: skip
        ax.text(start + len(piece.text) / 2, row, piece.text, ha="center", va="center", family="DejaVu Sans Mono",
                size=8, color="white" if share is not None and share > 0.6 else "black")  # fmt: skip
        start += len(piece.text)


def _shade(share: float) -> Any:
    import matplotlib

    return matplotlib.colormaps["Blues"](0.02 + 0.88 * share)


def policies(table: Mapping[float, Mapping[str, Estimate]]) -> Figure:
    """`policy_table` by share of chosen tokens. Left: where the mean estimate points. Right: how far one is off."""
    shares = [*table]
    names = [*next(iter(table.values()))]
    with style.context():
        drawn = style.figure(2.7)
        left, right = drawn.subplots(1, 2)
        for place, name in enumerate(names, 1):
            look = {"color": style.COLORS[place], "marker": style.MARKERS[place], "ls": style.DASHES[place]}
            found = [table[share][name] for share in shares]
            left.plot(shares, [f.cosine for f in found], label=name, **look)
            right.plot(shares, [(f.bias**2 + f.spread**2) ** 0.5 for f in found], **look)
        lowest = min(f.cosine for row in table.values() for f in row.values())
        left.set(ylabel="cosine with the full gradient", ylim=(lowest - 0.05, 1.02))
        right.set(ylabel="rms error, full gradient = 1", ylim=(0, None))
        left.set_title("the mean estimate", loc="left")
        right.set_title("one estimate", loc="left")
        _share_axes(left, right, shares=shares)
        style.legend(drawn, *left.get_legend_handles_labels())
    return drawn


def _share_axes(*axes: Axes, shares: Sequence[float], label: str = "predictions chosen (%)") -> None:
    for ax in axes:
        ax.set_xticks(shares, [f"{100 * share:.0f}" for share in shares])
        ax.set_xlabel(label)


def truncation(tables: Mapping[str, Mapping[float, Truncation]]) -> Figure:
    """A panel per entry of `tables`: `truncation_table`, cosines by share of chosen tokens."""
    lines = {
        "same": ("fractional with gather, same tokens", style.COLORS[3], "^", style.DASHES[2]),
        "gather": ("gather with all tokens", *MODE_LOOKS["gather"]),
        "fractional": ("fractional with all tokens", *MODE_LOOKS["fractional"]),
    }
    with style.context():
        drawn = style.figure(2.8)
        axes = np.atleast_1d(drawn.subplots(1, len(tables), sharey=True))
        for ax, (name, table) in zip(axes, tables.items(), strict=True):
            for field, (label, color, marker, dash) in lines.items():
                ax.plot([*table], [getattr(found, field) for found in table.values()], color=color, marker=marker,
                        ls=dash, label=label)  # fmt: skip
            ax.set_title(name, loc="left")
            _share_axes(ax, shares=[*table])
        lowest = min(min(found) for table in tables.values() for found in table.values())
        axes[0].set_ylim(max(0, lowest - 0.05), 1.03)
        axes[0].set_ylabel("cosine of two gradients")
        style.legend(drawn, *axes[0].get_legend_handles_labels())
    return drawn


def ledger(tables: Mapping[str, Mapping[str, Mapping[float, Cost]]]) -> Figure:
    """A column per entry of `tables`: `ledger_table`, FLOPs above, activations and logits below."""
    parts = {"flops": "step FLOPs", "activations": "activations, logits"}
    with style.context():
        drawn = style.figure(3.8)
        axes = drawn.subplots(len(parts), len(tables), sharex="col", sharey="row", squeeze=False)
        for column, (name, table) in zip(axes.T, tables.items(), strict=True):
            for ax, field in zip(column, parts, strict=True):
                ax.axhline(1, color="0.35", lw=0.8, zorder=1)
                for mode, costs in table.items():
                    color, marker, dash = MODE_LOOKS[mode]
                    ax.plot([*costs], [getattr(cost, field) for cost in costs.values()], color=color, marker=marker,
                            ls=dash, label=mode)  # fmt: skip
            column[0].set_title(name, loc="left")
            _share_axes(column[-1], shares=[*next(iter(table.values()))])
        costs = [cost for table in tables.values() for row in table.values() for cost in row.values()]
        for ax, (field, what) in zip(axes[:, 0], parts.items(), strict=True):
            ax.set_ylabel(f"{what}\n(plain step = 1)")
            ax.set_ylim(0, 1.08 * max(1, *(getattr(cost, field) for cost in costs)))
        style.legend(drawn, *axes[0, 0].get_legend_handles_labels())
    return drawn
