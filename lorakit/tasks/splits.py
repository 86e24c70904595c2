"""Which rows are train, validation and test: decided by a salted hash of the text alone, the same for every run."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lorakit.errors import DataError

Row = TypeVar("Row")
SALT = b"lorakit.tasks.splits"
HELD_OUT = 2000  # rows a validation or test split has at most; a tenth of a small corpus


def normal(text: str) -> str:
    """Lower case, single spaces: texts that differ only in these are duplicates."""
    return " ".join(text.lower().split())


def place(text: str) -> bytes:
    """Where `text` stands in the one shuffled order of all texts, 8 bytes."""
    return hashlib.blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=8, key=SALT).digest()


def shuffled(rows: Iterable[Row], text: Callable[[Row], str]) -> list[Row]:
    """Rows in hash order: a prefix is a random subset, and a longer prefix contains a shorter one."""
    return sorted(rows, key=lambda row: place(text(row)))


def held_out_share(rows: int) -> float:
    """Share of `rows` that goes to one held-out split."""
    return min(0.1, HELD_OUT / max(rows, 1))


def cut(
    rows: Sequence[Row],
    group: Callable[[Row], str],
    parts: int,
    weight: Callable[[Row], float] = lambda row: 1,
    share: float | None = None,
) -> list[list[Row]]:
    """`parts` held-out lists of `share` each by weight (None: `held_out_share`), then the rest; groups stay whole.

    Raises:
        DataError: too few groups for every list to have one.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[normal(group(row))].append(row)
    if len(groups) <= parts:
        raise DataError(f"{len(groups)} different rows are too few to be split into {parts + 1} parts")
    target = (held_out_share(len(rows)) if share is None else share) * sum(map(weight, rows))
    order = iter(sorted(groups, key=place))
    cuts = [_fill(order, groups, target, weight) for _ in range(parts)]
    rest = [row for name in order for row in groups[name]]
    if not rest:
        raise DataError(f"{len(rows)} rows are too few or too uneven to be split into {parts + 1} parts")
    return [*cuts, rest]


def _fill(
    order: Iterator[str], groups: dict[str, list[Row]], target: float, weight: Callable[[Row], float]
) -> list[Row]:
    taken: list[Row] = []
    full = 0.0
    while not taken or full < target:
        name = next(order, None)
        if name is None:
            break
        taken += groups[name]
        full += sum(map(weight, groups[name]))
    return taken


def keep_apart(
    train: Sequence[Row], validation: Sequence[Row], test: Sequence[Row], text: Callable[[Row], str]
) -> tuple[list[Row], list[Row], list[str]]:
    """Train and validation without rows whose normalised text is in a later split, and a note where any was."""
    in_test = {normal(text(row)) for row in test}
    in_validation = {normal(text(row)) for row in validation}
    kept_validation = [row for row in validation if normal(text(row)) not in in_test]
    later = in_test | in_validation
    kept_train = [row for row in train if normal(text(row)) not in later]
    dropped = len(train) - len(kept_train), len(validation) - len(kept_validation)
    note = f"dropped {dropped[0]} training and {dropped[1]} validation rows whose text is in a later split"
    return kept_train, kept_validation, [note] if any(dropped) else []


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
    wholes: dict[str, list[str]] = defaultdict(list)
    for text in sorted(known, key=lambda text: (-len(text.split()), text)):
        if text not in wholes:  # a phrase of a longer text brings no new spans
            for span in _spans(text.split()) & known:
                wholes[span].append(text)
    return wholes


def _spans(words: list[str]) -> set[str]:
    return {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
