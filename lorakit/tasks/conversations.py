"""Instruction data in chat form: `instruct` (train and validation files), `tulu` (the hub's mixture or its like)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import DataError
from lorakit.tasks import chat, hub, readers, splits
from lorakit.tasks.corpus import Corpus, fingerprints, required

INSTRUCT_LAYOUT = (
    "instruct/train.jsonl and instruct/validation.jsonl (and test.jsonl, where there is one), a chat a line"
)
TULU_LAYOUT = "tulu/*.jsonl or tulu/*.parquet with a column `messages`"

Chat = list[dict[str, str]]


def instruct_from_folder(folder: Path) -> Corpus:
    paths = [required(folder, name, INSTRUCT_LAYOUT) for name in ("train.jsonl", "validation.jsonl")]
    train, validation = map(_jsonl, paths)
    test_path = folder / "test.jsonl"
    if test_path.is_file():
        test, notes = _jsonl(test_path), []
        paths.append(test_path)
    else:
        validation, test = _halves(validation)
        notes = ["test: half of validation.jsonl, validation the other half"]
    train, validation, dropped = splits.keep_apart(train, validation, test, question)
    return Corpus(train, validation, test, fingerprints(paths), [*notes, *dropped])


def tulu_from_folder(folder: Path) -> Corpus:
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*.parquet")])
    if not paths:
        raise DataError(f"data_dir: no .jsonl or .parquet file in {folder}; expected layout: {TULU_LAYOUT}")
    chats = [row for path in paths for row in (_jsonl(path) if path.suffix == ".jsonl" else _checked_parquet(path))]
    return _cut(chats, paths, [])


def tulu_from_hub() -> Corpus:
    """Rows that are no conversation are left out and counted: they are not the user's to mend."""
    [paths] = hub.parquet_files("allenai/tulu-3-sft-mixture", ["data/train-*.parquet"]).values()
    rows = [messages for path in paths for _, messages in _parquet(path)]
    chats = [messages for messages in rows if chat.valid(messages)]
    dropped = len(rows) - len(chats)
    return _cut(chats, paths, [f"{dropped} rows dropped: not user and assistant in turn"] if dropped else [])


def question(messages: Chat) -> str:
    """Everything but the last answer: two chats with the same are duplicates."""
    return json.dumps(messages[:-1], ensure_ascii=False)


def _jsonl(path: Path) -> list[Chat]:
    return [_checked(row.get("messages") if isinstance(row, dict) else row, path, n) for n, row in readers.jsonl(path)]


def _checked_parquet(path: Path) -> list[Chat]:
    return [_checked(messages, path, number) for number, messages in _parquet(path)]


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    return ((number, row["messages"]) for number, row in readers.parquet(path, ("messages",)))


def _checked(messages: Any, path: Path, number: int) -> Chat:
    if not chat.valid(messages):
        raise readers.bad_row(path, number, chat.EXPECTED, messages)
    return messages


def _halves(chats: list[Chat]) -> tuple[list[Chat], list[Chat]]:
    """Equal questions on one side."""
    half, rest = splits.cut(chats, question, 1, share=0.5)
    return half, rest


def _cut(chats: list[Chat], paths: list[Path], notes: list[str]) -> Corpus:
    validation, test, train = splits.cut(chats, question, 2)
    return Corpus(train, validation, test, fingerprints(paths), ["validation and test: cut from train", *notes])


def instruct_elsewhere() -> Corpus:
    raise DataError(f"task instruct is read from data_dir (or LORAKIT_DATA) only; expected layout: {INSTRUCT_LAYOUT}")
