"""Sparse LoRA: when zeros appear, how many there are in the end, and what they save on disk."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from lorakit.analysis import names, style
from lorakit.analysis.figures import details
from lorakit.records import Record


def zeros_over_time(records: Sequence[Record]) -> Figure:
    """The share of zeros that was asked for (thin) and that was reached, against optimizer steps, a line per run."""
    history = [(r.row, r.seed, *point) for r in records for point in details(r, "sparsity")["history"]]
    table = pd.DataFrame(history, columns=["row", "seed", "step", "asked", "reached"])
    table, seeds = table.astype({"asked": float}), {record.seed for record in records}  # NaN: no schedule asks
    runs = {(r.row, r.seed): names.label(r.row, [r]) + f", seed {r.seed}" * (len(seeds) > 1) for r in records}
    table["run"] = [runs[key] for key in zip(table["row"], table["seed"], strict=True)]
    looks = {run: style.looks(row for row, _ in runs)[row] for (row, _), run in runs.items()}
    with style.panel(2.8) as ax:
        style.lines(ax, table, "step", "reached", "run", looks)
        for run, asked in table.dropna().groupby("run"):
            ax.plot(asked["step"], asked["asked"], color=looks[run].color, lw=0.8, alpha=0.6)
        ax.set(xlabel="optimizer steps", ylabel="share of zeros", ylim=(-0.02, None), title=records[0].setting)
        return style.legend(ax, "thin line: the schedule")


def zeros(record: Record) -> dict[str, float]:
    """Share of zeros in A, B, their product BA and the merged weight; sizes of kinds of files over the dense one's."""
    found = details(record, "sparsity")
    sizes = found["bytes"]
    return {
        **{name: found["zeros"][name] for name in ("A", "B", "BA", "merged")},
        **{f"{name} / dense bytes": sizes[name] / sizes["dense"] for name in ("packed", "compacted")},
    }
