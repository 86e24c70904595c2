"""Many short runs that differ in one thing, and what records say: method − other, seed by seed, with its interval."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lorakit import stats, style
from lorakit.files import RESULTS
from lorakit.records import Record, read_all

LOSS = "validation loss"
# of a short run, what no table of a study looks at
QUICK = {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "max_test": 16}


def ablate(base: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> list[Record]:
    """A run of `base` with each variant's changes and each seed; a record is called after its variant."""
    from lorakit.runs.experiment import run

    jobs = [(name, changes, seed) for name, changes in variants.items() for seed in seeds]
    return [run({**QUICK, **base, **changes, "row": name, "seed": seed}) for name, changes, seed in jobs]


def recorded(setting: str) -> list[Record]:
    """The records of a setting, none where it was not run."""
    return read_all(RESULTS / setting) if (RESULTS / setting).is_dir() else []


def gap_table(records: Sequence[Record], pairs: Mapping[str, str], value: str = LOSS) -> str:
    """A line per row of `pairs` that has finished runs: `value`, the rate kept, and the paired difference.

    Args:
        records: of one setting.
        pairs: row -> the row it is compared with ("" for none); rows without a record are left out.
    """
    groups, lines = stats.by_method(records), []
    for name in (name for name in pairs if name in groups and stats.finished(groups[name], value)):
        line = f"{_label(name):22s} {_spread([*stats.finished(groups[name], value).values()])}  {_rate(groups[name])}"
        other = pairs[name]
        gap = stats.paired_differences(groups[name], groups[other], value) if other in groups else None
        lines.append(line + (f"  − {_label(other)}: {_interval(gap)}, {gap.verdict}" if gap and gap.estimate else ""))
    return "\n".join(lines)


def _label(name: str) -> str:
    return style.METHODS[name].label if name in style.METHODS else name


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def _rate(group: Sequence[Record]) -> str:
    rates = [rate for r in group if (rate := r.details.get("gate", {}).get("acceptance_rate")) is not None]
    return f"{100 * statistics.fmean(rates):3.0f} %" if rates else "100 %"


def _interval(gap: stats.Difference) -> str:
    found = gap.estimate
    limits = "" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.mean:+.3f}{limits}, {found.count} seed{'s' * (found.count != 1)}"


class Shares(NamedTuple):
    """Of the batches a run saw, and of those it accepted, the shares that were redundant by design; mean over runs."""

    seen: float
    accepted: float


def redundant_shares(records: Sequence[Record]) -> dict[str, Shares]:
    """Row -> its `Shares`; rows whose stream was not redundant are left out."""
    table = {}
    for name, group in stats.by_method(records).items():
        gates = [record.details["gate"] for record in group if "redundant_seen" in record.details.get("gate", {})]
        if gates:
            seen = [gate["redundant_seen"] / gate["decisions"] for gate in gates]
            kept = [g["redundant_accepted"] / (g["redundant_accepted"] + g["fresh_accepted"]) for g in gates]
            table[name] = Shares(statistics.fmean(seen), statistics.fmean(kept))
    return table


def verdict(records: Sequence[Record], method: str, others: Sequence[str]) -> str:
    """One sentence, all of it from the records: the loss `method` ended at, and how that compares with `others`."""
    groups, where = stats.by_method(records), f"On {records[0].setting},"
    losses = stats.finished(groups.get(method, []), LOSS)
    if not losses:
        return f"{where} no run of {_label(method)} has finished."
    gaps = [stats.paired_differences(groups[method], groups[name], LOSS) for name in others if name in groups]
    gaps = [gap for gap in gaps if gap.estimate is not None]
    parts = [f'from "{_label(gap.baseline)}" by {_interval(gap)}: {gap.verdict}' for gap in gaps]
    unshown = ", ".join(f'"{_label(gap.baseline)}"' for gap in gaps if gap.verdict != "below")
    return (
        f"{where} {_label(method)}, accepting {_rate(groups[method]).strip()} of the batches, ended at a {LOSS} of "
        f"{statistics.fmean(losses.values()):.3f}, which differs {'; '.join(parts)}"
        + (f"; it is not shown to be better than {unshown}." if unshown else ".")
    )
