"""A corpus is text in three splits that share nothing.

Which row is where is decided by a salted hash of the text alone: every run of every method sees the same splits, and
rows whose text is the same never stand on two sides.
"""

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from lorakit import files
from lorakit.errors import DataError

Row = TypeVar("Row")
SALT = b"lorakit.tasks.splits"  # of all hashes: another one would be other splits
HELD_OUT = 2000  # rows a validation or test split has at most; a tenth of a small corpus


class Labelled(NamedTuple):
    """A text, or a pair of texts, with its class."""

    text: str
    pair: str | None
    label: int


@dataclass
class Corpus:
    """Rows (`Labelled`, documents as str, chats as messages or stored by `shards`), sha256 by name of files read."""

    train: Sequence[Any]
    validation: list[Any]
    test: list[Any]
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    classes: Sequence[str] = ()  # their names, where the data say them


@dataclass(frozen=True)
class Recipe:
    """How a task is read: every task's module says it in its `RECIPES`.

    Attributes:
        form: of its rows.
        origin: in words, what `elsewhere` reads.
        elsewhere: reads the hub (or a snapshot of it, if it is given the folder), an offline asset or the grammar;
            None: there are only the files of `data_files`.
        layout: the files `data_files` must hold; empty for a task that is generated.
        from_folder: reads them.
        f1: is F1 reported.
    """

    form: Literal["labelled", "documents", "chats"]
    origin: str
    elsewhere: Callable[..., Corpus] | None
    layout: str = ""
    from_folder: Callable[[Path], Corpus] | None = None
    f1: bool = False


def fingerprints(paths: Collection[Path]) -> dict[str, str]:
    """sha256 by `folder/file` name, where two have the same one by as many folders more as tell them apart."""
    depth = next(n for n in itertools.count(2) if len({path.parts[-n:] for path in paths}) == len({*paths}))
    return {"/".join(["", *path.parts][-depth:]): files.sha256(path) for path in paths}


def required(folder: Path, name: str, layout: str) -> Path:
    """`folder/name`.

    Raises:
        DataError: it is not there.
    """
    if not (path := folder / name).is_file():
        raise DataError(f"data_files: no file {path}; expected layout: {layout}")
    return path


def content(row: Any) -> str:
    """What makes two rows duplicates: both texts of a pair, a document, everything but a chat's last answer."""
    if isinstance(row, Labelled):
        return f"{row.text}\t{row.pair}"
    return row if isinstance(row, str) else json.dumps(row[:-1], ensure_ascii=False)


def apart(train: list[Row], validation: list[Row], test: list[Row], paths: Collection[Path], *notes: str) -> Corpus:
    """A corpus of the files at `paths`, without rows whose content is in a later split; a note counts them."""
    seen: set[str] = set()
    kept: list[list[Row]] = []
    for rows in (test, validation, train):
        names = [normal(content(row)) for row in rows]
        kept.insert(0, [row for name, row in zip(names, rows, strict=True) if name not in seen])
        seen.update(names)
    dropped = len(train) - len(kept[0]), len(validation) - len(kept[1])
    note = f"dropped {dropped[0]} training and {dropped[1]} validation rows whose text is in a later split"
    return Corpus(*kept, fingerprints(paths), [*notes, *[note] * any(dropped)])


def normal(text: str) -> str:
    """Lower case, single spaces: texts that differ only in these are duplicates."""
    return " ".join(text.lower().split())


def place(text: str) -> int:
    """Where `text` stands in the one shuffled order of all texts, a number of 64 bits with sign."""
    digest = hashlib.blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=8, key=SALT).digest()
    return int.from_bytes(digest, "big") - 2**63


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """Rows in hash order: a prefix is a random subset, and a longer prefix contains a shorter one."""
    return sorted(rows, key=lambda row: place(content(row)))


def held_out_share(rows: int) -> float:
    """Share of `rows` that goes to one held-out split."""
    return min(0.1, HELD_OUT / max(rows, 1))


def cut(
    rows: Sequence[Row], group: Callable[[Row], str], parts: int, weight: Callable[[Row], float] = lambda row: 1,
    share: float | None = None,
) -> list[list[Row]]:  # fmt: skip
    """`parts` held-out lists of `share` each by weight (None: `held_out_share`), then the rest; groups stay whole.

    Raises:
        DataError: too few groups for every list to have one.
    """
    at, weights = np.array([place(group(row)) for row in rows], "int64"), np.array([*map(weight, rows)])
    return [[rows[row] for row in part] for part in cut_places(at, parts, weights, share)]


def cut_places(places: np.ndarray, parts: int, weights: np.ndarray, share: float | None = None) -> list[np.ndarray]:
    """As `cut`, of rows whose groups are at these places (N,): the rows' numbers, in order of their places."""
    order = np.argsort(places, kind="stable")
    ends = np.flatnonzero(np.diff(places[order])) + 1  # of groups, but the last
    full, cuts = weights[order].cumsum(), [0]
    target = (held_out_share(len(order)) if share is None else share) * full[-1:].sum()
    for _ in range(parts):
        enough = np.searchsorted(full[ends - 1] - (full[cuts[-1] - 1] if cuts[-1] else 0), target)
        if enough == len(ends):
            raise DataError(f"{len(order)} rows are too few, or too much alike, to be split into {parts + 1} parts")
        cuts.append(int(ends[enough]))
    return np.split(order, cuts[1:])


def components(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """A group number per row, such that rows sharing any key are in one group (union-find)."""
    parent = list(range(len(keys)))
    first: dict[Any, int] = {}

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for row, names in enumerate(keys):
        for name in names:
            parent[root(row)] = root(first.setdefault(name, row))
    return [root(row) for row in range(len(keys))]


def phrase_families(texts: Iterable[str]) -> dict[str, list[str]]:
    """Normalised text -> the whole sentences it is a phrase of (itself, if it is part of no other text).

    A phrase is a contiguous run of words. SST-2's training rows are phrases of the same sentences, so a row-wise split
    would train on pieces of what it validates on.
    """
    known = {normal(text) for text in texts}
    openings: dict[tuple[str, ...], list[str]] = defaultdict(list)  # first words of a text, at most three -> texts
    for text in known:
        openings[tuple(text.split()[:3])].append(f"{text} ")
    wholes: dict[str, list[str]] = defaultdict(list)
    for text in sorted(known, key=lambda text: (-len(text.split()), text)):
        if text not in wholes:  # a phrase of a longer text brings no new spans
            words, spans, place = text.split(), set(), 0
            for i, word in enumerate(words):
                opened = (span for n in (1, 2, 3) for span in openings.get(tuple(words[i : i + n]), ()))
                spans |= {span for span in opened if f"{text} ".startswith(span, place)}
                place += len(word) + 1
            for span in spans:
                wholes[span.rstrip(" ")].append(text)
    return wholes
