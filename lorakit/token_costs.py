"""What choosing tokens costs and saves: FLOPs and memory of a step by mode and fraction, and what records say."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from lorakit import stats, style, table
from lorakit.records import Record
from lorakit.settings import Gating
from lorakit.token_tables import EVERY, MODES, Batch
from lorakit.tokens import build_tokens


class Cost(NamedTuple):
    """Of one training step, over the plain step's: FLOPs, activations and logits at the predicted peak, that peak."""

    flops: float
    activations: float
    peak: float


def ledger_table(
    model: nn.Module, batch: Batch, fractions: Sequence[float], **memory: Any
) -> dict[str, dict[float, Cost]]:
    """Mode -> fraction -> `Cost`; nothing is computed, so `model` may be on the meta device.

    Args:
        memory: options of `predict_step_memory`: autocast, device, …
    """
    plain = _step_cost(model, batch, None, memory)
    ledger: dict[str, dict[float, Cost]] = {}
    for mode in MODES:
        settings = {f: Gating(method="flora", mode=mode, topk_tokens=min(f, EVERY)) for f in fractions}
        costs = {f: _step_cost(model, batch, build_tokens(s, model, "causal"), memory) for f, s in settings.items()}
        ledger[mode] = {f: Cost(*(own / whole for own, whole in zip(c, plain, strict=True))) for f, c in costs.items()}
    return ledger


def ledger_lines(name: str, ledger: Mapping[str, Mapping[float, Cost]]) -> str:
    """A line per mode and fraction."""
    lines = [f"{name + ', of a plain step':44s} FLOPs  activations and logits  peak"]
    for mode, costs in ledger.items():
        lines += [f"{mode:>26s} {f:16.0%} {c.flops:6.2f} {c.activations:23.2f} {c.peak:5.2f}" for f, c in costs.items()]
    return "\n".join(lines)


def _step_cost(model: nn.Module, batch: Batch, tokens: Any, memory: Mapping[str, Any]) -> Cost:
    """FLOPs and bytes."""
    from lorakit.measure.memory import predict_step_memory

    predicted = predict_step_memory(model, batch, tokens=tokens, **memory)
    return Cost(
        step_flops(model, batch, tokens), predicted["activations"] + predicted["logits"], float(predicted["peak"])
    )


def step_flops(model: nn.Module, batch: Batch, tokens: Any = None) -> float:
    """Of forward and backward, on tensors without data; what scoring takes beyond matrix products is by formula.

    Args:
        tokens: which get a backward (`TokenSelection`); None: all.
    """
    from lorakit.measure.dry import fake, fake_mode, faked, training_state
    from lorakit.measure.flops import FlopCount

    real, mode = dict(batch), fake_mode()
    labels = real.pop("labels")
    with faked(model, mode), training_state(model, False):
        inputs = {name: fake(mode, value) for name, value in batch.items()}
        if tokens is None:
            with mode, FlopCount() as count:
                model(**inputs).loss.backward()
            return float(count.total)
        inputs.pop("labels")
        with tokens.dry(real, labels), mode, FlopCount() as count:
            selected = tokens.select(model, inputs, labels)
            selected.finish().backward()
    return count.total + (tokens.score.flops(selected.predictions) if tokens.scores(None) else 0)


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
    return {
        "baseline": all_tokens,
        "gather": gather,
        "fractional, pass 1": first,
        "fractional, pass 2": second,
    }


# records ---------------------------------------------------------------------------------------------


def by_mode(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Mode -> the records that ran in it; those without a choice are in both, to be compared with."""
    gatings = [record.resolved["gating"] for record in records]
    return {
        mode: [r for r, g in zip(records, gatings, strict=True) if g["method"] == "baseline" or g["mode"] == mode]
        for mode in MODES
    }


def cost_table(records: Sequence[Record], target: float | None = None) -> str:
    """A line per row: what it saw, what it spent, where its validation loss ended; with `target` also seconds.

    Args:
        target: a validation loss; a column says after how many seconds it was reached, "-" where it never was.
    """
    columns = {
        "steps": table.mean_cell(lambda r: r.costs.steps, "{:,.0f}"),
        "tokens seen": table.mean_cell(lambda r: r.costs.tokens, "{:,.0f}"),
        "backpropagated": table.mean_cell(lambda r: r.costs.tokens_backpropagated, "{:,.0f}"),
        "TFLOPs": table.mean_cell(lambda r: r.costs.flops / 1e12, "{:.3g}"),
        "validation loss": table.score_cell("validation loss"),
    }
    if target is not None:
        columns["seconds"] = table.mean_cell(lambda r: r.costs.seconds, "{:,.0f}")
        columns[f"until {target:.3f}"] = table.mean_cell(lambda r: first_at(r, "seconds", target), "{:,.0f}")
    return table.layout(table.cells(stats.by_method(records), columns), markdown=False)


def first_at(record: Record, x: str, target: float) -> float | None:
    """The smallest `x` at which the validation loss was `target` or below, its points joined by lines; None: never."""
    places, losses = stats.curve(record, x)
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    end = int(below[0])
    pair = slice(max(end - 1, 0), end + 1)
    return float(np.interp(-target, -losses[pair], places[pair]))


def ended(records: Sequence[Record], method: str) -> float | None:
    """Mean final validation loss of a row's finished runs; None where it has none."""
    losses = [*stats.finished([r for r in records if r.method == method], "validation loss").values()]
    return statistics.fmean(losses) if losses else None


def verdict(records: Sequence[Record], against: str = "lora") -> str:
    """One sentence, all of it from the records: where row `against` ended, and how far from that every other did.

    Raises:
        ParameterError: there are no records.
    """
    groups = stats.by_method(records)
    label = {name: look.label for name, look in style.looks([*groups, against]).items()}
    where, loss = f"On {records[0].setting},", ended(records, against)
    if loss is None:
        return f"{where} no run of {label[against]} has finished."
    gaps = [stats.paired_differences(groups[n], groups[against], "validation loss") for n in groups if n != against]
    told = [f'"{label[gap.method]}" {_distance(gap)}' for gap in gaps if gap.estimate is not None]
    return (
        f"{where} {label[against]} ended at a validation loss of {loss:.3f}"
        + (f"; the difference to it is {', '.join(told)}" if told else "")
        + "."
    )


def _distance(gap: stats.Difference) -> str:
    found = gap.estimate
    limits = "" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.mean:+.3f}{limits} ({found.count} seed{'s' * (found.count != 1)}: {gap.verdict})"
