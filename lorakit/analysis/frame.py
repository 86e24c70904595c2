"""Records as tidy tables: `frame(records)` has one line a run, one a point of a curve, one a kind of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from lorakit.analysis.names import label
from lorakit.errors import ParameterError
from lorakit.records import Costs, Parameters, Point, Record

NAMES = ["setting", "row", "seed", "status"]
MEASURED = ("train_loss", "learning_rate", "gate_score", "acceptance_rate")  # fields of a point that may be missing


class Frames(NamedTuple):
    """Records as three tables; a number that a run does not have is NaN.

    Attributes:
        runs: a line a run: setting, row, label, seed, status; method (what is trained), model, task, learning_rate,
            budget, budget_unit, redundancy; all of `Costs` and `Parameters`, predicted_peak, adapter_bytes, latency_ms,
            merged_latency_ms; gate, target_rate, acceptance_rate (after the burn-in); "validation loss", "test f1", ….
        curves: a line a point: setting, row, seed, status, the fields of a `Point`, "train loss", "validation loss", ….
        memory: setting, row, seed, kind, bytes, measured (else predicted); kind "peak" is the sum.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    memory: pd.DataFrame


def frame(records: Sequence[Record]) -> Frames:
    """The tables of `records`, in their order."""
    names = {name: [getattr(record, name) for record in records] for name in NAMES}
    names["label"] = [label(record.row, [record]) for record in records]
    asked = [record.resolved for record in records]
    names |= {name: [given.get(name) for given in asked] for name in ("method", "model", "task", "budget_unit")}
    gates = [gate_of([record]) for record in records]
    names["gate"] = [name for name, _ in gates]
    counts = [name for name in Costs.model_fields if "memory" not in name]
    names |= {name: [getattr(record.costs, name) for record in records] for name in counts}

    numbers = {name: [given.get(name) for given in asked] for name in ("learning_rate", "budget", "redundancy")}
    numbers["peak_memory_bytes"] = [record.costs.peak_memory_bytes for record in records]
    numbers["predicted_peak"] = [(record.costs.predicted_memory or {}).get("peak") for record in records]
    numbers |= {
        name: [getattr(record.parameters, name, None) for record in records] for name in Parameters.model_fields
    }
    numbers["adapter_bytes"] = [record.adapter_bytes for record in records]
    numbers["latency_ms"] = [getattr(record.latency, "unmerged_ms", None) for record in records]
    numbers["merged_latency_ms"] = [getattr(record.latency, "merged_ms", None) for record in records]
    numbers["target_rate"] = [rate for _, rate in gates]
    numbers["acceptance_rate"] = [record.details.get("gate", {}).get("acceptance_rate") for record in records]
    for split, metric in dict.fromkeys((s, m) for record in records for s, row in record.final.items() for m in row):
        numbers[f"{split} {metric}"] = [record.final.get(split, {}).get(metric) for record in records]

    points = [(record, point) for record in records for point in record.curve]
    curves = {name: [getattr(record, name) for record, _ in points] for name in NAMES}
    counts = [name for name in Point.model_fields if name not in (*MEASURED, "validation")]
    curves |= {name: [getattr(point, name) for _, point in points] for name in counts}
    measured = {name.replace("_loss", " loss"): [getattr(point, name) for _, point in points] for name in MEASURED}
    for metric in dict.fromkeys(metric for _, point in points for metric in point.validation or {}):
        measured[f"validation {metric}"] = [(point.validation or {}).get(metric) for _, point in points]

    kinds = []
    for record in records:
        predicted = (record.costs.predicted_memory or {}).items()
        for kind, size, seen in (*((*one, False) for one in predicted), ("peak", record.costs.peak_memory_bytes, True)):
            kinds += [(record.setting, record.row, record.seed, kind, size, seen)] if size is not None else []
    return Frames(
        pd.concat([pd.DataFrame(names), pd.DataFrame(numbers, dtype=float)], axis=1),
        pd.concat([pd.DataFrame(curves), pd.DataFrame(measured, dtype=float)], axis=1),
        pd.DataFrame(kinds, columns=[*NAMES[:3], "kind", "bytes", "measured"]),
    )


def gate_of(records: Sequence[Record]) -> tuple[str, float | None]:
    """The gate of a row and the acceptance rate it aims at; ("none", None) where every batch is accepted.

    Where tokens are chosen instead: "flora" or "random" with its mode, and the share of tokens.
    """
    for record in records:
        report, asked = record.details.get("gate", {}), record.resolved
        name = report.get("name", asked.get("gate", "none"))
        if name != "none":
            return name, report.get("target_rate", asked.get("gate_rate"))
        chosen = record.details.get("tokens", {}).get("gating")
        if chosen:
            return f"{chosen['method']} {chosen['mode']}", chosen["topk_tokens"]
    return "none", None


def require_comparable(records: Sequence[Record], mixed: bool = False) -> str:
    """What a reader must be told of records that are not of one model, one task and the same data; "" if they are.

    Only what both runs state is compared: an old record without fingerprints fits.

    Args:
        mixed: the reader insists on showing them together.

    Raises:
        ParameterError: they differ and `mixed` is False; names two runs and what differs.
    """
    differ = []
    for what, stated in {
        "model": [record.resolved.get("model") for record in records],
        "task": [record.resolved.get("task") for record in records],
        "model fingerprint": [record.fingerprints.get("model") for record in records],
        "data fingerprint": [record.fingerprints.get("data") for record in records],
    }.items():
        runs = [(told, record) for told, record in zip(stated, records, strict=True) if told]
        others = [run for run in runs if run[0] != runs[0][0]]
        if others and not mixed:
            found = "; ".join(f"{record.row} seed {record.seed}: {told}" for told, record in (runs[0], others[0]))
            raise ParameterError(
                "records", found, f"must be of one {what}; mixed=True or --mixed shows them all the same"
            )
        differ += [what] if others else []
    return f"not comparable: {', '.join(differ)} differ" if differ else ""
