"""SkipLoRA: of every adapter, how much it changes what passes through it, and how often it was trained."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorakit.analysis import style
from lorakit.analysis.figures import details
from lorakit.records import Record


def skip_map(record: Record) -> Figure:
    """Adapter by optimizer step as colours, the first adapter at the bottom.

    Left: M = ‖Δh‖ / ‖h‖, missing before it was measured. Right: the share of steps trained.
    """
    found = details(record, "skip")
    history, adapters, blocks = found["history"], found["adapters"], found["blocks"]
    measured = [row or [np.nan] * len(adapters) for row in history["metric"]]
    metric, active = (pd.DataFrame(m, history["step"], adapters, float).T for m in (measured, history["active"]))
    highest = np.nanquantile(metric, 0.97)  # one large adapter would leave no colour to the others
    with style.panel(1.6 + 0.055 * len(blocks), 2, sharey=True) as (left, right):
        _heat(left, metric, "M of each adapter", "viridis", highest)
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
    steps = [n for n in range(len(table.columns)) if n % max(1, -(-len(table.columns) // 6)) == 0]
    ax.set_xticks([n + 0.5 for n in steps], [f"{table.columns[n]:g}" for n in steps], rotation=0)
    ax.set_xlabel("optimizer steps")
