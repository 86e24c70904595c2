"""Records as tidy tables: `frame(records)` has one line a run, one a point of a curve, one a kind of memory."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import pandas as pd

from lorakit.analysis.names import label
from lorakit.errors import ParameterError
from lorakit.records import Costs, Parameters, Point, Record

NAMES = ["setting", "row", "seed", "status"]
ASKED = ("method", "model", "task", "learning_rate", "budget", "budget_unit", "redundancy")  # as parameters say
TEXTS = (*NAMES, "label", *ASKED[:3], "budget_unit", "gate")
COUNTS = [name for part in (Costs, Point) for name, info in part.model_fields.items() if info.annotation is int]
TYPED = [*TEXTS, *COUNTS]  # every other column is of floats: a record may lack its number


# parameters that say what of the files is trained and judged on
ROWS = ("max_length", "max_train", "max_validation", "max_test")


class Frames(list[Record]):
    """Records, and the same as three tables, each made once, when it is asked for; a number that a run lacks is NaN.

    Attributes:
        runs: a line a run: setting, row, label, seed, status; method (what is trained), model, task, learning_rate,
            budget, budget_unit, redundancy; all of `Costs` and `Parameters`, predicted_peak, adapter_bytes, latency_ms,
            merged_latency_ms; gate, target_rate, acceptance_rate (after the burn-in); "validation loss", "test f1", ….
        curves: a line a point: setting, row, seed, status, the fields of a `Point`, "train loss", "validation loss", ….
        memory: setting, row, seed, kind, bytes, measured (else predicted); kind "peak" is the sum.
    """

    @cached_property
    def runs(self) -> pd.DataFrame:
        known, lines = [*NAMES, "label", *ASKED, *Costs.model_fields, *Parameters.model_fields], []
        for record in self:
            gate, rate = gate_of([record])
            lines.append({
                **{name: getattr(record, name) for name in NAMES}, "label": label(record.row, [record]),
                **{name: record.resolved.get(name) for name in ASKED}, **dict(record.costs),
                "predicted_peak": (record.costs.predicted_memory or {}).get("peak"), **dict(record.parameters or ()),
                "adapter_bytes": record.adapter_bytes, "latency_ms": getattr(record.latency, "unmerged_ms", None),
                "merged_latency_ms": getattr(record.latency, "merged_ms", None), "gate": gate, "target_rate": rate,
                "acceptance_rate": record.details.get("gate", {}).get("acceptance_rate"),
                **{f"{split} {name}": v for split, row in record.final.items() for name, v in row.items()},
            })  # fmt: skip
        table = pd.DataFrame(lines, columns=[*dict.fromkeys(chain(known, *lines))]).drop(columns="predicted_memory")
        return table.astype(dict.fromkeys(table.columns.difference(TYPED), float))

    @cached_property
    def curves(self) -> pd.DataFrame:
        points = [(record, point) for record in self for point in record.curve]
        told = [point.validation or {} for _, point in points]
        table = {name: [getattr(record, name) for record, _ in points] for name in NAMES}
        table |= {name: [getattr(point, name) for _, point in points] for name in Point.model_fields}
        table |= {f"validation {name}": [one.get(name) for one in told] for name in dict.fromkeys(chain(*told))}
        made = pd.DataFrame(table).drop(columns="validation").rename(columns={"train_loss": "train loss"})
        return made.astype(dict.fromkeys(made.columns.difference(TYPED), float))

    @cached_property
    def memory(self) -> pd.DataFrame:
        lines = []
        for record in self:
            sizes = [(kind, size, False) for kind, size in (record.costs.predicted_memory or {}).items()]
            sizes.append(("peak", record.costs.peak_memory_bytes, True))
            lines += [(record.setting, record.row, record.seed, *size) for size in sizes if size[1] is not None]
        return pd.DataFrame(lines, columns=[*NAMES[:3], "kind", "bytes", "measured"])


def frame(records: Sequence[Record]) -> Frames:
    """The tables of `records`, in their order."""
    return records if isinstance(records, Frames) else Frames(records)


def gate_of(records: Sequence[Record]) -> tuple[str, float | None]:
    """The gate of a row and the acceptance rate it aims at; ("none", None) where every batch is accepted.

    Where examples are chosen: the gate's name and "example". Where tokens are: "flora" or "random" with its mode, and
    the share of tokens.
    """
    for record in records:
        report, asked = record.details.get("gate", {}), record.resolved
        name = report.get("name", asked.get("gate", "none"))
        if name != "none" and report.get("level", asked.get("gate_level")) == "example":
            return f"{name} example", 1 / (report.get("candidates") or asked["gate_candidates"])
        if name != "none":
            return name, report.get("target_rate", asked.get("gate_rate"))
        if chosen := record.details.get("tokens", {}).get("gating"):
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
    for what in ("model", "task", "model fingerprint", "data fingerprint", *ROWS):
        name, _, printed = what.partition(" ")
        stated = ((record.fingerprints if printed else record.resolved).get(name) for record in records)
        runs = [(told, record) for told, record in zip(stated, records, strict=True) if told not in (None, {})]
        others = [run for run in runs if run[0] != runs[0][0]]
        if others and not mixed:
            found = "; ".join(f"{record.row} seed {record.seed}: {told}" for told, record in (runs[0], others[0]))
            told = f"must be of one {what}; mixed=True or --mixed shows them all the same"
            raise ParameterError("records", found, told)
        differ += [what] if others else []
    return f"not comparable: {', '.join(differ)} differ" if differ else ""
