"""What choosing tokens costs and saves: FLOPs and memory of a step by mode and fraction, and what records say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from lorakit.analysis import names, stats, style, tables
from lorakit.analysis.frame import frame
from lorakit.head import rows
from lorakit.measure.flops import FlopCount
from lorakit.measure.memory import predict_step_memory
from lorakit.records import Record
from lorakit.settings import Gating, TokenSettings
from lorakit.studies.gates import ended, in_words
from lorakit.studies.tokens import EVERY, MODES, Batch, share_axis
from lorakit.tokens import build_tokens

DONE = {"not run": "white", "forward only": "#BFD7EA", "forward and backward": "#0072B2"}


def ledger_table(model: nn.Module, batch: Batch, fractions: Sequence[float], **memory: Any) -> pd.DataFrame:
    """A line per mode and fraction: FLOPs, activations with logits at the predicted peak, that peak; exact LoRA is 1.

    Nothing is computed, so `model` may be on the meta device.

    Args:
        memory: options of `predict_step_memory`: autocast, device, …
    """

    def cost(tokens: Any) -> np.ndarray:
        found = predict_step_memory(model, batch, tokens=tokens, **memory)
        return np.array([step_flops(model, batch, tokens), found["activations"] + found["logits"], found["peak"]])

    lines, whole = [], cost(build_tokens(Gating(), model, "causal", loss=TokenSettings()))
    for mode in MODES:
        for fraction in fractions:
            gating = Gating(method="flora", mode=mode, topk_tokens=min(fraction, EVERY))
            lines.append([mode, fraction, *cost(build_tokens(gating, model, "causal")) / whole])
    return pd.DataFrame(lines, columns=["mode", "fraction", "FLOPs", "activations and logits", "peak"])


@style.captioned
def ledger(ledgers: Mapping[str, pd.DataFrame]) -> Figure:
    """Of a step, FLOPs (above), activations and logits (below), by share of chosen tokens; 1: the plain step's."""
    parts = {"FLOPs": "step FLOPs", "activations and logits": "activations, logits"}
    highest = {part: max(table[part].max() for table in ledgers.values()) for part in parts}
    with style.panel(3.8, len(ledgers), len(parts), sharex="col", sharey="row", squeeze=False) as axes:
        for column, (name, table) in zip(axes.T, ledgers.items(), strict=True):
            for ax, (part, what) in zip(column, parts.items(), strict=True):
                ax.axhline(1, color="0.35", lw=0.8, zorder=1)
                style.lines(ax, table.pivot(index="fraction", columns="mode", values=part), MODES)
                ax.set(ylabel=f"{what}\n(all tokens = 1)", ylim=(0, 1.08 * max(1, highest[part])))
                ax.label_outer()
                share_axis(ax, table["fraction"].unique())
            column[0].set(xlabel="", title=name)
        return style.legend(axes[0, 0])


def step_flops(model: nn.Module, batch: Batch, tokens: Any = None) -> float:
    """Of forward and backward, on tensors without data; what scoring takes beyond matrix products is by formula.

    Args:
        tokens: which get a backward (`TokenSelection`); None: all, by the model's own loss.
    """
    count = FlopCount()
    predict_step_memory(model, batch, tokens=tokens, count=count)
    if tokens is None or not tokens.selective:
        return float(count.total)
    return count.total + tokens.score.flops(len(rows(batch["labels"], tokens.kind)[0]), tokens.score.seen)


def mode_table(tokens: int, chosen: Sequence[int], layers: int) -> dict[str, np.ndarray]:
    """Mode -> (layers + 1, passes · tokens) of what each layer, the head last, does with a token chosen by top-k.

    0: nothing; 1: a forward; 2: a forward, and a backward through it. Where the chosen ones' logits cannot be kept
    (PPS, random tokens, a head that is trained) they run through the head once more.
    """
    kept = np.isin(np.arange(tokens), chosen)
    all_tokens = np.full((layers + 1, tokens), 2)
    gather = all_tokens.copy()
    gather[-1] = 1 + kept
    first, second = np.ones_like(all_tokens), np.tile(2 * kept, (layers + 1, 1))
    first[-1], second[-1] = gather[-1], 0  # the loss, and what its backward gives the last layer, are known when scored
    return {"baseline": all_tokens, "gather": gather, "fractional, pass 1": first, "fractional, pass 2": second}


@style.captioned
def modes(tokens: int = 12, chosen: Sequence[int] = (3, 7), layers: int = 4) -> Figure:
    """What each layer does with each token: in the plain step, in mode "gather", in the two passes of "fractional"."""
    import seaborn as sns
    from matplotlib.patches import Patch

    table = mode_table(tokens, chosen, layers)
    with style.panel(1.3, len(table)) as axes:
        for ax, (name, done) in zip(axes, table.items(), strict=True):
            sns.heatmap(done, ax=ax, cmap=[*DONE.values()], vmin=0, vmax=len(DONE) - 1, cbar=False, square=True,
                        linewidths=1, linecolor="0.6", xticklabels=False, yticklabels=False)  # fmt: skip
            ax.invert_yaxis()
            ax.set(title=name, xlabel="tokens")
        axes[0].set_yticks(np.arange(layers + 1) + 0.5, [*(f"layer {n + 1}" for n in range(layers)), "head"])
        axes[0].tick_params(length=0)
        return style.legend(axes[0], key=([Patch(fc=fill, ec="0.6") for fill in DONE.values()], [*DONE]))


# records ---------------------------------------------------------------------------------------------


def by_mode(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Mode -> the records that ran in it; those without a choice are in both, to be compared with."""
    gatings = [(record.resolved["gating"], record) for record in records]
    return {mode: [r for g, r in gatings if g["method"] == "baseline" or g["mode"] == mode] for mode in MODES}


def cost_table(records: Sequence[Record], target: float | None = None) -> tables.Table:
    """A line per row: what it saw, what it spent, where its validation loss ended; with `target` also seconds.

    Args:
        target: a validation loss; a column says after how many seconds it was reached, "-" where it never was.
    """
    records = [record for group in stats.by_row(records).values() for record in group]
    runs = frame(records).runs
    columns = {"steps": ("steps", "{:,.0f}", 1), "tokens seen": ("tokens", "{:,.0f}", 1),
               "backpropagated": ("tokens_backpropagated", "{:,.0f}", 1), "TFLOPs": ("flops", "{:.3g}", 1e12),
               stats.LOSS: (stats.LOSS, tables.SCORE, 1)}  # fmt: skip
    if target is not None:
        runs = runs.assign(reached=np.array([first_at(record, "seconds", target) for record in records], float))
        columns |= {"seconds": ("seconds", "{:,.0f}", 1), f"until {target:.3f}": ("reached", "{:,.0f}", 1)}
    return tables.Table(tables.summary(runs, columns))


def first_at(record: Record, x: str, target: float) -> float | None:
    """The smallest `x` at which the validation loss was `target` or below, its points joined by lines; None: never."""
    places, losses = stats.curve(record, x)
    return stats.crossing(places, -losses, -target)


def verdict(records: Sequence[Record], against: str = "lora") -> str:
    """One sentence, all of it from the records: where row `against` ended, and how far from that every other did.

    Raises:
        ParameterError: there are no records.
    """
    groups, label = stats.by_row(records), names.label(against, records)
    where, loss = f"On {records[0].setting},", ended(records, against)
    if loss is None:
        return f"{where} no run of {label} has finished."
    gaps = stats.compare(records, against, stats.LOSS)
    told = [f'"{names.label(gap.method, groups[gap.method])}" {in_words(gap)}' for gap in gaps if gap.estimate]
    end = f"; the difference to it is {', '.join(told)}." if told else "."
    return f"{where} {label} ended at a {stats.LOSS} of {loss:.3f}{end}"
