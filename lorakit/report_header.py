"""What a report is about: setting, model, data, seeds, budgets, versions, machine, as far as the records say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorakit import report_tables
from lorakit.records import Record
from lorakit.report_data import Groups


def header(groups: Groups, sources: Sequence[str]) -> str:
    """The list a report begins with: what all rows share, and where they differ."""
    records = [record for group in groups.values() for record in group]
    data = _each(records, lambda r: [f"{n} ({h[:12]})" for n, h in r.fingerprints.get("data", {}).items()])
    lines = {
        "Setting": f"`{records[0].setting}`",
        "Read": f"{len(records)} records" + (f" under {', '.join(f'`{name}`' for name in sources)}" if sources else ""),
        "Model": _each(records, lambda r: [_known(r.resolved.get("model"), r.fingerprints.get("model"))]),
        "Data": _each(records, lambda r: [r.resolved.get("task")]) + (f": {data}" if data else ""),
        "Seeds": _by_row(groups, report_tables.seeds_of),
        "Learning rate": _by_row(groups, lambda g: _each(g, lambda r: [r.resolved.get("learning_rate")])),
        "Schedule": _by_row(groups, lambda g: _each(g, lambda r: [r.resolved.get("schedule")])),
        "Budget": _by_row(groups, lambda g: _each(g, _budget)),
        "Versions": _each(records, lambda r: [f"{n} {v}" for n, v in r.environment.get("versions", {}).items() if v]),
        "Machine": _one(_each(records, _machine, "; "), "; ", "seconds are not comparable"),
        "Code": _one(
            _each(records, lambda r: [str(r.fingerprints.get("code") or "")[:12]]), ", ", "fingerprints differ"
        ),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _machine(record: Record) -> list[str]:
    return [", ".join(str(record.environment[name]) for name in ("cpu", "device") if record.environment.get(name))]


def _one(text: str, separator: str, otherwise: str) -> str:
    return f"{text} ({otherwise})" if separator in text else text


def _each(records: Sequence[Record], values: Callable[[Record], list[Any]], separator: str = ", ") -> str:
    """Everything `values` gives over the records, each once."""
    found = dict.fromkeys(str(value) for record in records for value in values(record) if value not in (None, ""))
    return separator.join(found)


def _by_row(groups: Groups, text: Callable[[list[Record]], str]) -> str:
    """What all rows share, else each row's own."""
    texts = {row: text(group) for row, group in groups.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    common = max(texts.values(), key=[*texts.values()].count)
    others = [f"`{row}` {text or 'not recorded'}" for row, text in texts.items() if text != common]
    return f"{common or 'not recorded'}; but {'; '.join(others)}"


def _known(name: str | None, digest: str | None) -> str:
    return f"{name or ''} ({digest[:12]})".strip() if digest else name or ""


def _budget(record: Record) -> list[str]:
    asked = record.resolved
    return [f"{asked['budget']:,g} {asked.get('budget_unit', '')}".replace("_", " ")] if "budget" in asked else []
