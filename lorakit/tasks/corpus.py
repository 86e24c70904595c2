"""A corpus is text in three splits that share nothing, with the sha256 of every file it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.errors import DataError


class Labelled(NamedTuple):
    """A text, or a pair of texts, with its class."""

    text: str
    pair: str | None
    label: int


@dataclass
class Corpus:
    """Rows (`Labelled`, documents as str, or chats as lists of messages) by split."""

    train: list[Any]
    validation: list[Any]
    test: list[Any]
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def fingerprints(paths: Iterable[Path]) -> dict[str, str]:
    """sha256 by `folder/file` name."""
    return {f"{path.parent.name}/{path.name}": sha256(path) for path in paths}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def required(folder: Path, name: str, layout: str) -> Path:
    """`folder/name`.

    Raises:
        DataError: it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise DataError(f"data_dir: no file {path}; expected layout: {layout}")
    return path
