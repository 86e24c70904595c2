"""From what is given to a run, by any door: the setting's file, the row's file, then what was given, which wins."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorakit.errors import ParameterError, require, retold
from lorakit.fields import unknown
from lorakit.files import PARAMS
from lorakit.params.files import RESOURCES, ROW_QUESTIONS, SETTING, is_named, merge, of_files, read_files, rows_of
from lorakit.params.whole import GROUPS, NESTED, PER_RUN, QUESTIONS, Params, is_toy, known, rated

IPYTHON = ("In", "Out", "exit", "quit", "get_ipython", "open")


def resolve(given: dict[str, Any]) -> Params:
    """Complete `given` and validate it.

    Raises:
        ParameterError: naming the first offending key, its value and what is allowed.
    """
    return Params(**complete(given))


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """What `given` leaves open by the files of its setting and row, where they exist, and by its method's stated rate.

    Raises:
        ParameterError: a params file breaks the rule of rows, or the setting has no such row and `given` makes none.
    """
    for name in NESTED:
        require(is_named(inner := given.get(name, {})), name, inner, "must be a mapping of names to values")
    given = given if "setting" in given or is_toy(given) else {"setting": "own"} | given  # of no setting of ours
    setting, row = given.get("setting"), given.get("row")
    folder = PARAMS / str(setting)
    if not isinstance(setting, str) or not os.path.isfile(folder / SETTING):
        return rated(given)
    rows = rows_of(folder)
    by_hand = any(QUESTIONS.get(name) in (*ROW_QUESTIONS, "training", "data") for name in given)
    told = f"{setting} has {', '.join(rows)}; another says what it changes"
    require(not row or row in rows or by_hand, "row", row, told)
    filed = switched_off(of_files(folder, row if row in rows else ""), given)
    moved = {name for name in ("model", "task", "method") if name in given and given[name] != known(filed, name)}
    if setting == "toy" and moved - {"method"} and not is_toy(given):
        filed.pop("learning_rate", None)
    if moved and "learning_rate" not in given:
        filed.pop("learning_rate_from", None)  # that search was about another run
    return rated(merge(filed, given))


def switched_off(filed: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`filed` without what would say nothing once `given` is heard: of a gate, say, where `gate: none` is given."""
    off = {name for name, group in NESTED.items() if given.get(name, {}).get("method") == group().method}
    for group in GROUPS:
        for idle in (idle for idle in group.idle if idle.switch in given):
            with contextlib.suppress(TypeError):  # of a value that is none, which is told of later
                if idle.when(SimpleNamespace(**{idle.switch: given[idle.switch]})):
                    off.update(idle.of(group))
    return {name: value for name, value in filed.items() if name not in off}


def params_of(setting: str, row: str) -> dict[str, Any]:
    """What `params/<setting>/` says for the file `<row>.yaml`, its setting file first.

    Raises:
        ParameterError: there is no such setting or row; the message lists those that exist.
    """
    settings = sorted(path.parent.name for path in PARAMS.glob(f"*/{SETTING}"))
    require(setting in settings, "setting", setting, f"must be one of {', '.join(settings)}")
    return complete({"setting": setting, "row": row})


def beside(given: dict[str, Any], row: str, **changes: Any) -> dict[str, Any]:
    """What another row of the same setting is, run beside `given`: on its model, data, seed, budget and rate.

    What the reader set otherwise than the files of `given`'s own row holds for the other row too; a learning rate that
    was not set is the other row's own, as its file or the setting says. A `row` without a file is the setting's
    reference with `changes`.

    Args:
        given: completed, as `collect` gives it; its record and run_dir are its own.
    """
    named = {name: given[name] for name in ("setting", "row") if given.get(name)}
    filed = complete(named) if named else {}
    own = {name for name, question in QUESTIONS.items() if question in ROW_QUESTIONS} | {*PER_RUN, "method"}
    said = {name: value for name, value in given.items() if name not in own and value != known(filed, name)}
    seed = {"seed": given["seed"]} if "seed" in given else {}
    return complete(merge({"setting": given.get("setting", "toy"), "row": row} | seed | said, changes))


def given(files: list[str | Path], overrides: list[str]) -> dict[str, Any]:
    """Params files and what was typed after `-p`, later ones winning; see `read_files`, `parse_override`."""
    merged = read_files(files)
    for name, value in map(parse_override, overrides):
        merged = merge(merged, {name: value})
    ours = [path.resolve().parents[1] == PARAMS for path in map(Path, files) if (path.parent / SETTING).is_file()]
    if not all(ours):  # another folder's setting may be called as one of ours
        merged = Params(**rated(merged)).model_dump()
    return merged


def parse_override(text: str) -> tuple[str, Any]:
    """`name=value` as typed after `-p`; the value is read as YAML, so types are the parameter's own.

    `gating.mode=gather` is one key of the mapping `gating`; to be joined by `merge`.
    """
    from lorakit.params import reading

    name, equals, value = text.partition("=")
    require(bool(equals and name), "-p", text, "must be name=value")
    shown = text if len(text) <= 100 else f"{text[:97]}..."
    with retold(ValueError, ParameterError, "-p", shown, "the value is not YAML"):
        read = reading.read(value) if value else ""
    outer, dot, inner = name.partition(".")
    return (outer, {inner: read}) if dot and outer in NESTED else (name, read)


def collect(namespace: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a notebook's `globals()`, completed, for `lorakit.run`; to be called before it defines more.

    Raises:
        ParameterError: a literal there that is no parameter: a mistyped name would otherwise change nothing.
    """
    from lorakit.params import reading

    found = {}
    for name, value in namespace.items():
        if name in QUESTIONS:
            number = "float" in str(Params.model_fields[name].annotation) and isinstance(value, str)
            # 1e-3 is text to some that run notebooks
            found[name] = float(value) if number and reading.SCIENTIFIC.fullmatch(value) else value
        elif not name.startswith("_") and name not in (*IPYTHON, RESOURCES):
            require(not _is_literal(value), name, value, unknown(name, QUESTIONS))
    return complete(found)


def _is_literal(value: Any) -> bool:
    if value is None or type(value) in (str, int, float, bool):
        return True
    parts = [*value, *value.values()] if type(value) is dict else value
    return type(value) in (dict, list) and all(map(_is_literal, parts))
