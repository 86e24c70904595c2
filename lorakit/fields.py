"""A parameter: name, default, range, one line of meaning, and what it does not matter for; groups of them that refuse
what does not go together. `lorakit.settings` holds them all; nothing here imports torch."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Callable, Container, Iterable
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorakit.errors import ParameterError

# what a parameter does not matter for; see `flagged`
FREE = "may change between a checkpoint and its resumption without changing a single weight"
APART = "changes nothing about the result: where and how a run is kept, and what is said of it"
UNTRIED = "a trial of a learning-rate search does not depend on it: it sets its own, and never reads the test split"

LARGEST = {int: 2**31 - 1, float: 1e30}  # what counts and torch's single precision take
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # "~" is the user's folder, as a shell would have it


class Refusal(NamedTuple):
    """A combination that does not go: where `when` holds of a run's parameters, `parameter` is refused for `why`."""

    parameter: str
    why: str
    when: Callable[[Any], bool]


class Idle(NamedTuple):
    """Parameters that say nothing while `when` holds of their group; no names: all but the one of `without`."""

    without: str  # what would make them mean something; begins with that parameter's name
    when: Callable[[Any], bool]
    names: tuple[str, ...] = ()

    @property
    def switch(self) -> str:
        return self.without.partition(" ")[0]

    def of(self, group: type[Settings]) -> tuple[str, ...]:
        """The parameters of `group` that are meant."""
        return self.names or tuple(name for name in group.model_fields if name != self.switch)


def field(default: Any, meaning: str, *flags: str, **limits: Any) -> Any:
    """A parameter: its default, one line of meaning, what it does not matter for, and its range (ge, gt, le, lt).

    Numbers without an end of their own are at most `LARGEST`.
    """
    if type(default) in LARGEST and limits.keys().isdisjoint(("le", "lt")):
        limits["le"] = LARGEST[type(default)]
    return Field(default, description=meaning, json_schema_extra={"flags": list(flags)}, **limits)


class Settings(BaseModel):
    """A group of parameters, checked when made and unchangeable after.

    Raises:
        ParameterError: naming the first offending parameter, its value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    question: ClassVar[str] = ""  # the one it answers; a row of a table may answer one differently
    refuses: ClassVar[tuple[Refusal, ...]] = ()  # what does not go together with the rest of a run
    idle: ClassVar[tuple[Idle, ...]] = ()  # what would change nothing

    def __init__(self, **given: Any):
        try:
            super().__init__(**given)
        except ValidationError as error:
            first, *_ = problems = error.errors()  # of several types that a value may have, the nearest
            problem = max((p for p in problems if p["loc"][:1] == first["loc"][:1]), key=lambda p: len(p["loc"]))
            cause, name = problem.get("ctx", {}).get("error"), ".".join(map(str, problem["loc"][:1]))
            if isinstance(cause, ParameterError):  # of several parameters together, or of a nested group
                raise ParameterError(f"{name}.{cause.name}".lstrip("."), cause.value, cause.allowed) from None
            value, allowed = given.get(name), problem["msg"]
            if problem["type"] == "extra_forbidden":
                allowed = unknown(name, type(self).model_fields)
            elif problem["type"] == "string_type":
                allowed += f"; YAML reads yes, no, on, off and numbers as others: quote them, {name}='\"yes\"'"
            elif isinstance(value, str):
                with contextlib.suppress(ValueError):
                    right = f"{float(value):.1e}"
                    allowed += f"; it is a string: YAML reads 1e-4 as text, write {right} with a dot and no quotes"
            raise ParameterError(name, value, allowed) from None

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        json.dumps(value, ensure_ascii=False, skipkeys=True, default=repr).encode()  # half a character is a ValueError
        return value

    @classmethod
    def of(cls, whole: Settings) -> Self:
        """The part of `whole` that this class is about."""
        return cls(**{name: getattr(whole, name) for name in cls.model_fields})

    @classmethod
    def require_meant(cls, whole: Settings, names: Container[str], prefix: str = "") -> None:
        """Refuse what of `names` would change nothing about `whole`.

        Raises:
            ParameterError: naming the parameter, with `prefix`, its value and what it says nothing without.
        """
        for idle in cls.idle:
            for name in idle.of(cls):
                if name in names and idle.when(whole):
                    about = idle.without.split()[0]
                    found = f"; {prefix}{about}={getattr(whole, about)!r}" if hasattr(whole, about) else ""
                    told = f"says nothing without {prefix}{idle.without}{found}"
                    raise ParameterError(prefix + name, getattr(whole, name), told)

    def but(self, **changes: Any) -> Self:
        """A copy with `changes`, checked."""
        return type(self)(**dict(self) | changes)


def flagged(settings: type[Settings], flag: str) -> set[str]:
    """The parameters that carry FREE, APART or UNTRIED."""
    return {name for name, info in settings.model_fields.items() if flag in info.json_schema_extra["flags"]}


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of `known`."""
    close = difflib.get_close_matches(name, known := list(known), 1)
    return "unknown parameter; " + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}")
