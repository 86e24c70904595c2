"""What can be said to a run: the reference of all parameters, what goes with what, and the values of one row."""

import argparse
import os
import textwrap
import types
from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tabulate import tabulate

from lorakit.errors import ParameterError
from lorakit.fields import LARGEST, Settings
from lorakit.files import PARAMS
from lorakit.params.doors import resolve
from lorakit.params.files import ROW_QUESTIONS, SETTING, of_files, read, row_of_file, rows_of
from lorakit.params.whole import GROUPS, METHODS, NESTED, PER_RUN, QUESTIONS, TOLD, Params, check, known
from lorakit.settings import SparseSettings

LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
# what a run may be besides its method, for the table of what goes together
ANSWERS: dict[str, dict[str, Any]] = TOLD["answers"]
ALWAYS = ("model", "task", "method", "learning_rate", "batch_size", "budget", "budget_unit")  # shown of every run
KNOBS: dict[str, tuple[str, ...]] = {  # and of a run of this method
    "lora": ("rank", "alpha"),
    "sparse": ("rank", "alpha", *SparseSettings.model_fields),
    "hira": ("rank",),
    "peft": ("rank", "alpha", "peft_type", "peft_options"),
}


def reference(markdown: bool = False) -> str:
    """Every parameter by the question it answers: name, type, default, range, meaning."""
    parts: list[str] = []
    for group in GROUPS:
        title, rows = (group.__doc__ or "").split("\n")[0], [*_rows(group)]
        if markdown:
            rows = [(f"`{name}`", *(text.replace("|", "\\|") for text in texts)) for name, *texts in rows]
            rows = tabulate(rows, ("parameter", "is", "default", "meaning"), "pipe", disable_numparse=True)
        else:
            rows = textwrap.indent(tabulate(rows, tablefmt="plain", disable_numparse=True), "  ")
        parts.append(f"## {title}\n\n{rows}" if markdown else f"{title}\n{rows}")
    return "\n\n".join(parts)


def _rows(group: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, info in group.model_fields.items():
        if name in NESTED:
            yield from _rows(NESTED[name], f"{name}.")
            continue
        limits = [f"{LIMITS[kind]} {getattr(limit, kind):g}" for limit in info.metadata for kind in LIMITS
                  if getattr(limit, kind, None) not in (None, *LARGEST.values())]  # fmt: skip
        default = info.get_default()
        shown = f"{default:g}" if isinstance(default, float) else "–" if default == "" else str(default)
        yield prefix + name, ", ".join([_kind(info.annotation), *limits]), shown, info.description or ""


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(part) or "–" for part in parts)
    if origin in (Union, types.UnionType, Annotated):
        return " | ".join(map(_kind, parts[:1] if origin is Annotated else parts))
    words = {str: "text", int: "whole number", float: "number", bool: "true | false", list: "list", dict: "mapping"}
    return (words | {type(None): "none"})[origin or annotation]


def capabilities() -> dict[str, dict[str, str]]:
    """What goes together: by method or answer, for each answer "yes" or the reason why not."""
    rows = {method: {"method": method} for method in METHODS} | ANSWERS
    table = {name: dict.fromkeys(ANSWERS, "yes") for name in rows}
    for (name, own), (other, theirs) in product(rows.items(), ANSWERS.items()):
        if own.keys() & theirs.keys():
            table[name][other] = "–" if own == theirs else "one or the other"
            continue
        try:
            check(Params(**own | theirs))
        except ParameterError as error:
            table[name][other] = f"{error.name}: {error.allowed}"
    return table


def capability_table() -> str:
    """`capabilities` in Markdown, the reasons numbered below."""
    table = capabilities()
    reasons = [*dict.fromkeys(answer for answers in table.values() for answer in answers.values() if ": " in answer)]
    numbered = {reason: f"no ({number})" for number, reason in enumerate(reasons, 1)}
    rows = [[name, *(numbered.get(answer, answer) for answer in answers.values())] for name, answers in table.items()]
    lines = [tabulate(rows, ["", *ANSWERS], "pipe"), ""]
    return "\n".join([*lines, *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def shown(given: dict[str, Any]) -> Any:
    """A DataFrame of what a run is about and of what it has otherwise than the defaults: value, and who says so."""
    import pandas

    params, folder = resolve(given), PARAMS / str(given.get("setting"))
    about = {*ALWAYS, *KNOBS.get(params.method, ())}
    sources, asked = {}, set()
    if os.path.isfile(folder / SETTING):
        sources["the setting"] = read(folder / SETTING)
        if params.row in rows_of(folder):
            sources["the row"] = of_files(folder, params.row)
            asked = {QUESTIONS[name] for name in row_of_file(folder, params.row)} & set(ROW_QUESTIONS)
    rows = []
    for name, question in QUESTIONS.items():
        value, default = getattr(params, name), known({}, name)
        if name in PER_RUN or (value == default and question not in asked and name not in about):
            continue
        plain = value.model_dump(exclude_defaults=True) if isinstance(value, Settings) else value
        told = {who: said[name] for who, said in sources.items() if name in said}
        if isinstance(value, Settings):  # of which a file may leave out keys that are defaults
            told = {who: type(value)(**said) if isinstance(said, dict) else said for who, said in told.items()}
        where = next((who for who, said in told.items() if said == value), "")
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
