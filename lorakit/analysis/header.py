"""What a report is about: setting, model, data, seeds, budgets, versions, machine, as far as the records say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorakit.analysis.equal_cost import Groups
from lorakit.records import Record


def header(groups: Groups, sources: Sequence[str]) -> str:
    """The list a report begins with: what all rows share, and where they differ."""
    records = [record for group in groups.values() for record in group]
    read = f" under {', '.join(f'`{name}`' for name in sources)}" if sources else ""
    tasks = each(records, lambda r: [r.resolved.get("task")])
    files = each(records, lambda r: [_known(n, digest) for n, digest in r.fingerprints.get("data", {}).items()])
    machines = each(records, lambda r: [", ".join(r.environment[n] for n in ("cpu", "device") if n in r.environment)])
    codes = each(records, lambda r: [(r.fingerprints.get("code") or "")[:12]])
    versions = each(records, lambda r: [f"{n} {v}" for n, v in r.environment.get("versions", {}).items() if v])
    lines = {
        "Setting": f"`{records[0].setting}`",
        "Read": f"{len(records)} records{read}",
        "Model": ", ".join(each(records, lambda r: [_known(r.resolved.get("model"), r.fingerprints.get("model"))])),
        "Data": ": ".join(", ".join(found) for found in (tasks, files) if found),
        "Seeds": _by_row(groups, lambda r: [r.seed]),
        "Learning rate": _by_row(groups, lambda r: [r.resolved.get("learning_rate")]),
        "Schedule": _by_row(groups, lambda r: [r.resolved.get("schedule")]),
        "Budget": _by_row(groups, _budget),
        "Versions": ", ".join(versions),
        "Machine": "; ".join(machines) + " (seconds are not comparable)" * (len(machines) > 1),
        "Code": ", ".join(codes) + " (fingerprints differ)" * (len(codes) > 1),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def each(records: Sequence[Record], values: Callable[[Record], list[Any]]) -> list[str]:
    """Everything `values` gives over the records, each once."""
    found = (value for record in records for value in values(record))
    return [*dict.fromkeys(str(value) for value in found if value not in (None, ""))]


def _by_row(groups: Groups, values: Callable[[Record], list[Any]]) -> str:
    """What all rows share, else each row's own."""
    texts = {row: ", ".join(each(group, values)) or "not recorded" for row, group in groups.items()}
    common = max(texts.values(), key=[*texts.values()].count)
    others = [f"`{row}` {text}" for row, text in texts.items() if text != common]
    return f"{common}; but {'; '.join(others)}" if others else common.replace("not recorded", "")


def _known(name: str | None, digest: str | None) -> str:
    return f"{name or ''} ({digest[:12]})".strip() if digest else name or ""


def _budget(record: Record) -> list[str]:
    asked = record.resolved
    return [f"{asked['budget']:,g} {asked.get('budget_unit', '')}".replace("_", " ")] if "budget" in asked else []
