"""Sparse LoRA: when zeros appear, how many there are in the end, and what they save on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.analysis import names, style
from lorakit.analysis.figures import details
from lorakit.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


def zeros_table(records: Sequence[Record]) -> DataFrame:
    """A line per run and point of its history: row, seed, optimizer step, share of zeros asked for and reached.

    What is asked for is missing where no schedule asks.
    """
    import pandas as pd

    history = [(r.method, r.seed, *point) for r in records for point in details(r, "sparsity")["history"]]
    return pd.DataFrame(history, columns=["row", "seed", "step", "asked", "reached"]).astype({"asked": float})


def zeros_over_time(records: Sequence[Record]) -> Figure:
    """The share of zeros that was asked for (thin) and that was reached, against optimizer steps, a line per run."""
    table = zeros_table(records)
    table["run"] = table["row"] + " " + table["seed"].astype(str)
    rows = dict(zip(table["run"], table["row"], strict=True))
    looks = {run: style.looks(rows.values())[row] for run, row in rows.items()}
    with style.context():
        drawn = style.figure(2.8)
        ax = drawn.subplots()
        style.lines(ax, table, "step", "reached", "run", looks, {run: names.label(row) for run, row in rows.items()})
        for run, asked in table.dropna().groupby("run"):
            ax.plot(asked["step"], asked["asked"], color=looks[run].color, lw=0.8, alpha=0.6)
        ax.set(xlabel="optimizer steps", ylabel="share of zeros", ylim=(-0.02, None))
        ax.set_title(records[0].setting, loc="left")
        style.legend(drawn, *ax.get_legend_handles_labels(), title="thin line: the schedule")
    return drawn


def zeros(record: Record) -> dict[str, float]:
    """Share of zeros in A, B, their product BA and the merged weight; sizes of kinds of files over the dense one's."""
    found = details(record, "sparsity")
    sizes = found["bytes"]
    return {
        **{name: found["zeros"][name] for name in ("A", "B", "BA", "merged")},
        **{f"{name} / dense bytes": sizes[name] / sizes["dense"] for name in ("packed", "compacted")},
    }
