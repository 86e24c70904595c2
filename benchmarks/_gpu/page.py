"""Records of cards -> `docs/gpu.md`: every claim with both sides, ratio, target and verdict, measured or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import NO_TARGET
from benchmarks._gpu import memory, suite, times
from benchmarks._gpu.comparing import REAL
from lorakit.files import PROJECT

RECORDS, PAGE = PROJECT / "benchmarks" / "measured" / "gpu", PROJECT / "docs" / "gpu.md"
HEAD = """# On a GPU

`make gpu` measures these claims on a machine with CUDA, offline, on random weights of real dimensions. It goes in parts
(`PART=tests`, `memory`, `time`; at most 8 minutes each), writes `benchmarks/measured/gpu/<card>.json`, and from all of
those this page (`PART=page`). A part that is there is left alone without `AGAIN=1`; what lacks a package (bitsandbytes,
TRL, Liger, flash-attn) or a larger card is skipped and said. In an environment of one's own: `python -m benchmarks._gpu
--part memory`. With `--rehearse FOLDER` every part is tried at tiny sizes, on a CPU too, and nothing is measured.
"""
NONE = "\n**Not measured**: there is no record of a card. Below is what would be measured, and how.\n"
REHEARSED = "\n**A rehearsal** at tiny sizes, not measured: no number here says anything of a GPU.\n"
COLUMNS = "| claim | ours | theirs | unit | ratio | target | verdict |\n|---|---:|---:|---|---:|---:|---|"


def records(folder: Path = RECORDS) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def page(cards: Sequence[dict[str, Any]]) -> str:
    """The page of these records; without one it says what would be measured."""
    return HEAD + ("".join(map(_card, cards)) if cards else NONE + _parts({}, "##", asked=True))


def _card(card: dict[str, Any]) -> str:
    title = f"\n## {card['card']}\n{REHEARSED if card['rehearsal'] else ''}"
    return title + _parts(card["parts"], "###", asked=not card["rehearsal"])


def _parts(parts: dict[str, Any], mark: str, asked: bool) -> str:
    """A section each; `asked`: of a real card, with verdicts and a row for each claim that is not measured."""
    text = ""
    for name, module in (("tests", suite), ("memory", memory), ("time", times)):
        part = parts.get(name)
        lines = suite.said(part) if module is suite else "\n".join([COLUMNS, *_rows(module, part, asked)])
        text += f"\n{mark} {name.capitalize()}\n\n{module.HOW}\n\n{lines}\n"
        text += f"\n{_where(part)}\n" if part else ""
    return text


def _rows(module: Any, part: dict[str, Any] | None, asked: bool) -> Iterator[str]:
    """A claim's each; what was not measured at the end."""
    part = part or {"claims": [], "not_measured": {}}
    for one in part["claims"]:
        verdict = "" if one["target"] is None or not asked else "ok" if one["ok"] else "missed"
        sides = [_number(one[side], ",.1f") for side in ("ours", "theirs")]
        cells = [*sides, one["unit"], _number(one["ratio"], ".3f"), _number(one["target"], ".2f"), verdict]
        yield f"| {one['name']} | {' | '.join(cells)} |"
    missing = dict.fromkeys(part["not_measured"], "")
    if asked:
        goals = {one.name: one.target for one in module.comparisons(REAL, "cuda")}
        missing |= {name: "" if goal == NO_TARGET else f"{goal:.2f}" for name, goal in goals.items()}
    measured = {one["name"] for one in part["claims"]}
    for name, goal in missing.items():
        if name not in measured:
            yield f"| {name} | | | | | {goal} | {part['not_measured'].get(name, 'not measured')} |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _where(part: dict[str, Any]) -> str:
    """When, on what, with what."""
    machine = part["machine"]
    versions = [f"{name} {found}" for name, found in sorted(machine["versions"].items()) if found]
    known = [f"{name} {found}" for name, found in machine["gpu"].items()]
    return f"{part['date']}, {', '.join([machine['device'], *known, *versions])}."
