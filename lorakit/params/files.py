"""Params files: a setting's file is the reference run, a row's file one change of it, and nothing else is read."""

import os
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, ParameterError, require, retold
from lorakit.fields import APART, Settings, field, flagged, unknown
from lorakit.files import PROJECT
from lorakit.params.whole import NESTED, PER_RUN, QUESTIONS, Params, method_of

SETTING = "_setting.yaml"
RESOURCES = "resources"  # of these files the one key that is no parameter: what a scheduler is asked for
ROW_QUESTIONS = ("adapter", "base", "skip", "gate", "tokens")  # a row answers one of them otherwise than its setting
ROW_MAY = (
    "a row changes one question (what is trained, the base, layers, batches or tokens), or its budget (compares), or "
    "makes other rows' changes together (combines); besides, learning_rate and what `differs` gives a reason for"
)


def rows_of(folder: Path) -> list[str]:
    """The names of the rows that a setting's folder has files of."""
    return sorted(path.stem for path in folder.glob("[!_]*.yaml"))


def of_files(folder: Path, row: str) -> dict[str, Any]:
    """The setting's file, then the row's: the reference run and its one change."""
    values = _own(folder / SETTING)
    for part in [*row_of_file(folder, row).get("combines", []), row] if row else []:
        own = row_of_file(folder, part)
        said = {} if part == row else {"label": "", "learning_rate_from": ""}
        values = merge(values, method_of(part) | {name: own[name] for name in own if name not in said})
    return values


def row_of_file(folder: Path, row: str) -> dict[str, Any]:
    """The keys of a row's file, which obey the rule: a row is the reference and one change.

    Raises:
        ParameterError: naming the file, the key and what is allowed.
    """
    path = folder / f"{row}.yaml"
    values = _own(path)
    said = Params(**{name: values[name] for name in ("combines", "differs", "compares") if name in values})
    for other in said.combines:
        told = f"{other!r} is no other row of {folder.name}, which has {', '.join(rows_of(folder))}"
        _require(other in rows_of(folder) and other != row, path, "combines", said.combines, told)
    for name in said.differs:
        _require(name in values, path, "differs", said.differs, f"{name} is not set beside its reason")
    free = flagged(Params, APART) | {"learning_rate", *said.differs}
    if said.compares:
        free |= {"budget", "budget_unit"}
    named = {} if row == "lora" else method_of(row)  # LoRA is the reference
    questions = {name: QUESTIONS[name] for name in named | values if name not in free}
    allowed = {QUESTIONS[name] for other in said.combines for name in method_of(other) | row_of_file(folder, other)}
    if not (said.combines or said.compares):
        allowed = {*list(questions.values())[:1]}
    for name, question in questions.items():
        _require(question in allowed & {*ROW_QUESTIONS}, path, name, values.get(name, row), ROW_MAY)
    source = str(values.get("learning_rate_from", ""))
    found = not source.endswith(".json") or os.path.isfile(PROJECT / source)
    _require(found, path, "learning_rate_from", source, "no such record")
    return values


def _own(path: Path) -> dict[str, Any]:
    """The parameters of a setting's or a row's file."""
    values = {name: value for name, value in read(path).items() if name != RESOURCES}
    for name, value in values.items():
        _require(name in QUESTIONS, path, name, value, unknown(name, [*QUESTIONS, RESOURCES]))
        _require(name not in PER_RUN, path, name, value, "is a run's own: say it when the run is started")
    return values


def _require(condition: bool, path: Path, name: str, value: Any, allowed: str) -> None:
    require(condition, name, value, f"in {path.parent.name}/{path.name}: {allowed}")


def read(path: Path) -> dict[str, Any]:
    """One YAML file's mapping of names to values."""
    from lorakit.params import reading  # yaml only where there is some

    require(os.path.isfile(path), "-f", str(path), "no such params file")
    with retold(ValueError, LorakitError, f"{path}: not YAML"):
        values = reading.read(path.read_text(encoding="utf-8"))
    values = {} if values is None else values
    require(is_named(values), "-f", str(path), "must be a mapping of parameter names to values")
    return values


def is_named(values: Any) -> bool:
    """Whether it is a mapping of names to values."""
    return isinstance(values, dict) and all(isinstance(name, str) for name in values)


def merge(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """`first` with the values of `then` where both have one; mappings of NESTED are merged themselves.

    Where a rate comes from is said of that rate only.
    """
    joined = first | then
    for name in NESTED:
        if isinstance(first.get(name), dict) and isinstance(then.get(name), dict):
            joined[name] = first[name] | then[name]
    if "learning_rate_from" not in then and then.get("learning_rate", rate := first.get("learning_rate")) != rate:
        joined.pop("learning_rate_from", None)
    return joined


def read_files(paths: list[str | Path]) -> dict[str, Any]:
    """Merge YAML params files, later files winning; a file of a setting's folder names setting and row by its path.

    Raises:
        ParameterError: a file is missing, is not a mapping of names to values, or breaks the rule of rows.
    """
    merged: dict[str, Any] = {}
    for path in map(Path, paths):
        if os.path.isfile(path.parent / SETTING) and path.is_file():
            folder, row = path.resolve().parent, "" if path.name == SETTING else path.stem
            before = merged.get("setting", folder.name)
            told = f"is of another setting than {before}, which is named before"
            require(before == folder.name, "-f", str(path), told)
            merged = merge(merged, {"setting": folder.name} | ({"row": row} if row else {}) | of_files(folder, row))
        else:
            merged = merge(merged, read(path))
    return merged


# what a run needs of a machine, for a scheduler ------------------------------------------------------


class Resources(Settings):
    """The keys of `resources:`; nothing that a run computes depends on them, and no record holds them."""

    gpus: int = field(1, "GPUs; of several each has a process, through `accelerate launch`, and no notebook", ge=0)
    cpus: int = field(8, "cores", ge=1)
    memory: float = field(32.0, "GiB of main memory", gt=0)
    hours: float = field(4.0, "until the scheduler stops the run, which goes on from its checkpoint when asked", gt=0)
    together: int = field(1, "short runs in one submission, one after another, each with all of this", ge=1)


def resources(paths: list[Path]) -> Resources:
    """What the params files ask for, later ones winning.

    Raises:
        ParameterError: naming key, value, file and what is allowed.
    """
    asked: dict[str, object] = {}
    for path in paths:
        own, place = read(path).get(RESOURCES, {}), f"in {path.parent.name}/{path.name}"
        require(is_named(own), RESOURCES, own, f"{place}: must be a mapping of names to values")
        try:
            asked |= Resources(**own).model_dump(exclude_unset=True)
        except ParameterError as error:
            raise ParameterError(f"{RESOURCES}.{error.name}", error.value, f"{place}: {error.allowed}") from None
    return Resources(**asked)
