"""HiRA: the spectrum of its update, which ends at no rank, next to LoRA's, which does."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from lorakit.analysis import names, style

LOWEST = 1e-9  # what is zero but for rounding lies on the lower edge


def spectrum_table(updates: Mapping[str, Any]) -> pd.DataFrame:
    """A line per row and singular value of its update matrix ΔW, (out, in): its place, and its size over the largest.

    Args:
        updates: row -> ΔW.
    """
    parts = []
    for row, update in updates.items():
        sigma = torch.linalg.svdvals(torch.as_tensor(update).double()).numpy()
        parts.append(pd.DataFrame({"row": row, "size": sigma / sigma[0]}).rename_axis("place").reset_index())
    return pd.concat(parts).assign(place=lambda table: table["place"] + 1)


def spectrum(updates: Mapping[str, Any], rank: int) -> Figure:
    """`spectrum_table`, a line per row; the rank r of the factors is marked."""
    table = spectrum_table(updates).assign(size=lambda table: table["size"].clip(lower=LOWEST))
    with style.panel(2.8) as ax:
        style.lines(ax, table, "place", "size", "row", style.looks(updates), {row: names.label(row) for row in updates})
        ax.axvline(rank, color="0.4", lw=0.9, ls=":")
        ax.annotate(f"r = {rank}", (rank, 5e-10), (-4, 4), textcoords="offset points", ha="right", size=8)
        ax.set(xlabel="singular value, largest first", ylabel="size over the largest", yscale="log", ylim=(5e-10, 2))
        return style.legend(ax)
