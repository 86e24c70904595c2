"""Instruction data in chat form: `instruct` (train and validation files), `tulu` (the hub's mixture or its like)."""

from pathlib import Path

from pyarrow.parquet import read_metadata

from lorakit.assets import hub
from lorakit.errors import DataError
from lorakit.tasks import chat, own, readers, shards
from lorakit.tasks.corpus import Corpus, Recipe, apart, content, cut, required
from lorakit.tasks.task import SPLITS

# the files that `data_files` must hold
INSTRUCT = "instruct/train.jsonl and instruct/validation.jsonl (and test.jsonl, where there is one), a chat a line"
TULU, COLUMNS = "tulu/*.jsonl or tulu/*.parquet with a column `messages`", ("messages",)


def instruct_from_folder(folder: Path) -> Corpus:
    paths = [required(folder, name, INSTRUCT) for name in ("train.jsonl", "validation.jsonl")]
    paths += folder.glob("test.jsonl")
    train, validation, *given = ([*own.chats(path)] for path in paths)
    if given:
        return apart(train, validation, *given, paths)
    validation, test = cut(validation, content, 1, share=0.5)  # equal questions on one side
    return apart(train, validation, test, paths, "test: half of validation.jsonl, validation the other half")


def tulu_from_folder(folder: Path) -> Corpus:
    if not (paths := sorted([*folder.glob("*.jsonl"), *folder.glob("*.parquet")])):
        raise DataError(f"data_files: no .jsonl or .parquet file in {folder}; expected layout: {TULU}")
    return shards.corpus_of(paths, own.chats)


def tulu_from_hub(folder: Path | None = None) -> Corpus:
    """Rows that are no conversation are left out and counted: they are not the user's to mend."""
    [paths] = hub.data_files("allenai/tulu-3-sft-mixture", "data", ("train",), folder)
    found = shards.corpus_of(paths, lambda path: filter(chat.valid, (m for _, [m] in readers.parquet(path, COLUMNS))))
    rows = sum(read_metadata(path).num_rows for path in paths)
    if dropped := rows - sum(len(getattr(found, split)) for split in SPLITS):
        found.notes.append(f"{dropped} rows dropped: not user and assistant in turn")
    return found


RECIPES = {
    "instruct": Recipe("chats", "", None, INSTRUCT, instruct_from_folder),
    "tulu": Recipe("chats", "hub allenai/tulu-3-sft-mixture", tulu_from_hub, TULU, tulu_from_folder),
}
