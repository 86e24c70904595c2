"""QLoRA: NF4's 16 values under the weights they stand for, and where a quantized model's bits go."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lorakit.analysis import style


def codebook(weights: Any, codes: Sequence[float]) -> Figure:
    """A histogram of weights over their block's largest, (N,) in [-1, 1], and the 16 values NF4 rounds them to."""
    import seaborn as sns

    with style.panel(2.6) as ax:
        sns.histplot(x=np.asarray(weights), bins=81, binrange=(-1, 1), stat="density", color=style.COLORS[5],
                     alpha=1, lw=0, label="weights", ax=ax)  # fmt: skip
        for place, code in enumerate(codes):
            ax.axvline(code, color=style.COLORS[2], lw=1.0, label="NF4's 16 values" if place == 0 else None)
        ax.set(xlabel="weight over the largest of its block of 64", ylabel="density", xlim=(-1.04, 1.04))
        return style.legend(ax)


def weight_bytes(tables: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bits a parameter costs, over all parameters of the model, stacked by the kind of weight they go to.

    Args:
        tables: name of a model -> its `measure.weights.weight_table`.
    """
    parts = [pd.DataFrame(table["rows"]).assign(model=name) for name, table in tables.items()]
    every = pd.concat(parts, ignore_index=True)
    every["bits"] = 8 * every["bytes"] / every.groupby("model")["parameters"].transform("sum")
    wide = every.pivot_table("bits", "model", "kind", "sum", fill_value=0)
    table = wide.reindex(index=[*tables], columns=every["kind"].unique())
    with style.panel(1.0 + style.rows_height(tables)) as ax:
        style.stacked(ax, table, [f"{total:.1f}" for total in table.sum(axis=1)])
        ax.margins(x=0.1)
        ax.set_xlabel("bits per parameter of the whole model")
        return style.legend(ax)
