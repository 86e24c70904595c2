"""What can be said to a run: the reference of all parameters, what goes with what, and the values of one row."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from lorakit.errors import ParameterError
from lorakit.fields import Settings
from lorakit.files import PARAMS
from lorakit.params.doors import resolve
from lorakit.params.files import ROW_QUESTIONS, SETTING, of_files, read, row_of_file, rows_of
from lorakit.params.whole import GROUPS, METHODS, NESTED, PER_RUN, QUESTIONS, Params, check, known

LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
ANSWERS: dict[str, dict[str, Any]] = {  # what a run may be besides its method, for the table of what goes together
    "4 bits": {"quantize": "nf4"},
    "SkipLoRA": {"skip": "prefix"},
    "a gate": {"gate": "novelty"},
    "tokens, gather": {"gating": {"method": "flora", "mode": "gather"}},
    "tokens, fractional": {"gating": {"method": "flora", "mode": "fractional"}},
    "fp16": {"precision": "fp16"},
    "checkpointing": {"gradient_checkpointing": True},
    "select: best": {"select": "best"},
}


def reference(markdown: bool = False) -> str:
    """Every parameter by the question it answers: name, type, default, range, meaning."""
    parts: list[str] = []
    for group in GROUPS:
        title = (group.__doc__ or "").split("\n")[0]
        rows = list(_rows(group))
        if markdown:
            lines = ["| parameter | is | default | meaning |", "|---|---|---|---|"]
            lines += ["| " + " | ".join([f"`{row[0]}`", *(_cell(text) for text in row[1:])]) + " |" for row in rows]
            parts.append("\n".join([f"## {title}", "", *lines]))
        else:
            wide = [max(len(row[column]) for row in rows) for column in range(3)]
            lines = ["  ".join([*(text.ljust(w) for text, w in zip(row, wide, strict=False)), row[3]]) for row in rows]
            parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _rows(group: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, info in group.model_fields.items():
        if name in NESTED:
            yield from _rows(NESTED[name], f"{name}.")
            continue
        limits = [f"{LIMITS[kind]} {getattr(limit, kind):g}" for limit in info.metadata for kind in LIMITS
                  if getattr(limit, kind, None) is not None]  # fmt: skip
        default = info.get_default()
        shown = f"{default:g}" if isinstance(default, float) else "–" if default == "" else str(default)
        yield prefix + name, ", ".join([_kind(info.annotation), *limits]), shown, info.description or ""


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(part) or "–" for part in parts)
    if origin in (Union, types.UnionType):
        return " | ".join(map(_kind, parts))
    if annotation is type(None):
        return "none"
    words = {str: "text", int: "whole number", float: "number", bool: "true | false", list: "list", dict: "mapping"}
    return words[origin or annotation]


def capabilities() -> dict[str, dict[str, str]]:
    """What goes together: by method or answer, for each answer "yes" or the reason why not."""
    rows = {method: {"method": method} for method in METHODS} | ANSWERS
    return {
        name: {other: _together(own, theirs) for other, theirs in ANSWERS.items()} for name, own in rows.items()
    }  # fmt: skip


def _together(one: dict[str, Any], other: dict[str, Any]) -> str:
    if one == other:
        return "–"
    if one.keys() & other.keys():
        return "one or the other"
    try:
        check(Params(**one | other))
    except ParameterError as error:
        return f"{error.name}: {error.allowed}"
    return "yes"


def capability_table() -> str:
    """`capabilities` in Markdown, the reasons numbered below."""
    table, reasons = capabilities(), []
    lines = ["| | " + " | ".join(ANSWERS) + " |", "|---" * (len(ANSWERS) + 1) + "|"]
    for name, answers in table.items():
        cells = []
        for answer in answers.values():
            if ": " in answer and answer not in reasons:
                reasons.append(answer)
            cells.append(f"no ({reasons.index(answer) + 1})" if answer in reasons else answer)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def shown(given: dict[str, Any]) -> Any:
    """A DataFrame of what a run has otherwise than the defaults, or is about as a row: value, and who says so."""
    import pandas

    params, folder = resolve(given), PARAMS / str(given.get("setting"))
    sources, asked = {}, set()
    if (folder / SETTING).is_file():
        sources["the setting"] = read(folder / SETTING)
        if params.row in rows_of(folder):
            sources["the row"] = of_files(folder, params.row)
            asked = {QUESTIONS[name] for name in row_of_file(folder, params.row)} & set(ROW_QUESTIONS)
    rows = []
    for name, question in QUESTIONS.items():
        value, default = getattr(params, name), known({}, name)
        if name in PER_RUN or (value == default and question not in asked):
            continue
        plain = value.model_dump(exclude_defaults=True) if isinstance(value, Settings) else value
        kind = type(value) if isinstance(value, Settings) else None
        where = next((who for who, said in sources.items()
                      if name in said and (kind(**said[name]) if kind else said[name]) == value), "")  # fmt: skip
        where = where or ("default" if value == default else "given" if name in given else "the method's default")
        rows.append((name, plain, where))
    return pandas.DataFrame(rows, columns=["parameter", "value", "said by"]).set_index("parameter")


def main(argv: list[str] | None = None) -> int:
    """`lorakit params`: every parameter that a run can be told, or what goes together."""
    parser = argparse.ArgumentParser(prog="lorakit params", description=main.__doc__)
    parser.add_argument("--markdown", action="store_true", help="tables for the documentation")
    parser.add_argument("--capabilities", action="store_true", help="what goes with what, and why not")
    arguments = parser.parse_args(argv)
    print(capability_table() if arguments.capabilities else reference(arguments.markdown))
    return 0
