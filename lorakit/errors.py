"""One clear error per mistake: it names the parameter, the value and what is allowed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LorakitError(Exception):
    """Base of every error that is the user's to mend; one line that can be read, whatever it quotes."""

    status = 2  # of the command that it ends

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())[:1900]


class ParameterError(LorakitError, ValueError):
    """A parameter has a value it cannot have.

    Args:
        name: the parameter as the user wrote it.
        value: what it was given.
        allowed: what it may be, in words.
    """

    def __init__(self, name: str, value: object, allowed: str):
        super().__init__(f"{str(name):.100}={value!r:.300}: {allowed}")
        self.name, self.value, self.allowed = name, value, allowed


class NotFinite(ParameterError):
    """NaN or infinity where numbers must be finite; to a trainer that its run has diverged."""


class DataError(LorakitError, ValueError):
    """A data file is missing or malformed; the message names the file and, where there is one, the line."""


class AssetError(LorakitError, RuntimeError):
    """A model or a data set could not be had: hub unreachable, hash mismatch, truncated archive."""


class CheckpointError(LorakitError, ValueError):
    """A checkpoint or an adapter file does not fit this run or this model; the message says where."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ParameterError(name, value, allowed)` unless `condition` holds."""
    if not condition:
        raise ParameterError(name, value, allowed)


def require_finite(finite: bool, name: str, value: object, allowed: str = "must be finite") -> None:
    """Raise `NotFinite(name, value, allowed)` unless `finite`."""
    if not finite:
        raise NotFinite(name, value, allowed)


@contextmanager
def retold(caught: type | tuple[type, ...], kind: type[LorakitError], *said: Any) -> Iterator[None]:
    """Raise `kind(*said)` of what is `caught` inside, in whose own words, in one line, the last of `said` ends."""
    try:
        yield
    except caught as error:
        if isinstance(error, LorakitError):  # said in words of ours already
            raise
        *before, what = said
        raise kind(*before, f"{what}: {' '.join(str(error).split()):.300}") from None
