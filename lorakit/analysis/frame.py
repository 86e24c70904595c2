"""Records as tidy tables: `frame(records)` has one line a run, one a point of a curve, one a kind of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.analysis.names import label
from lorakit.errors import ParameterError
from lorakit.records import Costs, Point, Record

if TYPE_CHECKING:
    import pandas as pd

RUN: dict[str, Callable[[Record], Any]] = {
    "setting": lambda r: r.setting,
    "row": lambda r: r.row,
    "label": lambda r: label(r.row, [r]),
    "seed": lambda r: r.seed,
    "status": lambda r: r.status,
    "model": lambda r: r.resolved.get("model"),
    "task": lambda r: r.resolved.get("task"),
    "method": lambda r: r.resolved.get("method"),  # what is trained
    "budget_unit": lambda r: r.resolved.get("budget_unit"),
    "gate": lambda r: gate_of([r])[0],
} | {name: lambda r, name=name: getattr(r.costs, name) for name in Costs.model_fields if "memory" not in name}
NUMBERS: dict[str, Callable[[Record], float | None]] = {  # of a run that may not have them: NaN
    "learning_rate": lambda r: r.resolved.get("learning_rate"),
    "budget": lambda r: r.resolved.get("budget"),
    "redundancy": lambda r: r.resolved.get("redundancy"),
    "peak_memory_bytes": lambda r: r.costs.peak_memory_bytes,
    "predicted_peak": lambda r: (r.costs.predicted_memory or {}).get("peak"),
    "trainable": lambda r: r.parameters and r.parameters.trainable,
    "total": lambda r: r.parameters and r.parameters.total,
    "nonzero": lambda r: r.parameters and r.parameters.nonzero,
    "reduction_factor": lambda r: r.parameters and r.parameters.reduction_factor,
    "adapter_bytes": lambda r: r.adapter_bytes,
    "latency_ms": lambda r: r.latency and r.latency.unmerged_ms,
    "merged_latency_ms": lambda r: r.latency and r.latency.merged_ms,
    "target_rate": lambda r: gate_of([r])[1],
    "acceptance_rate": lambda r: r.details.get("gate", {}).get("acceptance_rate"),  # after the burn-in
}
NAMES = ("setting", "row", "seed", "status")
MEASURED = ("train_loss", "learning_rate", "gate_score", "acceptance_rate")  # fields of a point that may be missing


class Frames(NamedTuple):
    """Records as three tables; a number that a run does not have is NaN.

    Attributes:
        runs: a line a run: the columns of `RUN` and `NUMBERS`, and final metrics as "test accuracy", ….
        curves: a line a point: setting, row, seed, status, the fields of a `Point`, "train loss", "validation loss", ….
        memory: setting, row, seed, kind, bytes, measured (else predicted); kind "peak" is the sum.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    memory: pd.DataFrame


def frame(records: Sequence[Record]) -> Frames:
    """The tables of `records`, in their order."""
    import pandas as pd

    runs = {name: [read(record) for record in records] for name, read in RUN.items()}
    numbers = {name: [read(record) for record in records] for name, read in NUMBERS.items()}
    for split, metric in dict.fromkeys((s, m) for record in records for s, row in record.final.items() for m in row):
        numbers[f"{split} {metric}"] = [record.final.get(split, {}).get(metric) for record in records]

    points = [(record, point) for record in records for point in record.curve]
    curves: dict[str, list] = {name: [getattr(record, name) for record, _ in points] for name in NAMES}
    counts = [name for name in Point.model_fields if name not in (*MEASURED, "validation")]
    curves |= {name: [getattr(point, name) for _, point in points] for name in counts}
    measured = {name.replace("_loss", " loss"): [getattr(point, name) for _, point in points] for name in MEASURED}
    for metric in dict.fromkeys(metric for _, point in points for metric in point.validation or {}):
        measured[f"validation {metric}"] = [(point.validation or {}).get(metric) for _, point in points]

    kinds = [
        (record.setting, record.row, record.seed, kind, size, measured)
        for record in records
        for kind, size, measured in (
            *((kind, size, False) for kind, size in (record.costs.predicted_memory or {}).items()),
            ("peak", record.costs.peak_memory_bytes, True),
        )
        if size is not None
    ]
    return Frames(
        pd.concat([pd.DataFrame(runs), pd.DataFrame(numbers, dtype=float)], axis=1),
        pd.concat([pd.DataFrame(curves), pd.DataFrame(measured, dtype=float)], axis=1),
        pd.DataFrame(kinds, columns=["setting", "row", "seed", "kind", "bytes", "measured"]),
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
    for what, read in {
        "model": lambda r: r.resolved.get("model"),
        "task": lambda r: r.resolved.get("task"),
        "model fingerprint": lambda r: r.fingerprints.get("model"),
        "data fingerprint": lambda r: r.fingerprints.get("data"),
    }.items():
        stated = [record for record in records if read(record)]
        other = next((record for record in stated if read(record) != read(stated[0])), None)
        if other is None:
            continue
        if not mixed:
            one, two = (f"{record.row} seed {record.seed}: {_short(read(record))}" for record in (stated[0], other))
            raise ParameterError(
                "records", f"{one}; {two}", f"must be of one {what} to be compared (mixed=True, --mixed: all the same)"
            )
        differ.append(what)
    return f"not comparable: {', '.join(differ)} differ" if differ else ""


def _short(stated: Any) -> str:
    return ", ".join(f"{k} {v[:12]}" for k, v in stated.items()) if isinstance(stated, dict) else str(stated)[:40]
