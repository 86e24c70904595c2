"""The toy tasks: text the toy grammar writes, a stream of its own for every split, the same rows for every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorakit.tasks import conversations, splits
from lorakit.tasks.corpus import Corpus, Labelled
from lorakit.tasks.toy import grammar

ROWS = {"train": 960, "validation": 240, "test": 240}
SURPLUS = 8  # times the rows needed are written, of which those already seen are passed over


def reviews() -> Corpus:
    return _corpus(
        lambda count, seed: [Labelled(text, None, label) for text, label in grammar.reviews(count, seed)], _text
    )


def stories() -> Corpus:
    return _corpus(grammar.stories, str)


def chats() -> Corpus:
    return _corpus(grammar.chats, conversations.question)


def _text(row: Labelled) -> str:
    return row.text


def _corpus(write: Callable[[int, int], list[Any]], text: Callable[[Any], str]) -> Corpus:
    """Training rows as they come; held-out rows are those no earlier split has."""
    seen: set[str] = set()
    rows: dict[str, list[Any]] = {}
    for split, count in ROWS.items():
        written = write(count if split == "train" else SURPLUS * count, grammar.split_seed(split))
        rows[split] = [row for row in written if splits.normal(text(row)) not in seen][:count]
        seen |= {splits.normal(text(row)) for row in rows[split]}
    return Corpus(**rows)
