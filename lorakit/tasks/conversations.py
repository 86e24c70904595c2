"""Instruction data in chat form: `instruct` (train and validation files), `tulu` (the hub's mixture or its like)."""

from pathlib import Path

from lorakit.assets import hub
from lorakit.errors import DataError
from lorakit.tasks import chat, own, readers
from lorakit.tasks.corpus import Corpus, Recipe, apart, content, cut, fingerprints, required

# the files that `data_dir` must hold
INSTRUCT = "instruct/train.jsonl and instruct/validation.jsonl (and test.jsonl, where there is one), a chat a line"
TULU = "tulu/*.jsonl or tulu/*.parquet with a column `messages`"


def instruct_from_folder(folder: Path) -> Corpus:
    paths = [required(folder, name, INSTRUCT) for name in ("train.jsonl", "validation.jsonl")]
    paths += folder.glob("test.jsonl")
    train, validation, *given = map(own.chats, paths)
    if given:
        return apart(train, validation, *given, paths)
    validation, test = cut(validation, content, 1, share=0.5)  # equal questions on one side
    return apart(train, validation, test, paths, "test: half of validation.jsonl, validation the other half")


def tulu_from_folder(folder: Path) -> Corpus:
    if not (paths := sorted([*folder.glob("*.jsonl"), *folder.glob("*.parquet")])):
        raise DataError(f"data_dir: no .jsonl or .parquet file in {folder}; expected layout: {TULU}")
    return _tulu([messages for path in paths for messages in own.chats(path)], paths)


def tulu_from_hub(folder: Path | None = None) -> Corpus:
    """Rows that are no conversation are left out and counted: they are not the user's to mend."""
    [paths] = hub.data_files("allenai/tulu-3-sft-mixture", "data", ("train",), folder)
    rows = [messages for path in paths for _, [messages] in readers.parquet(path, ("messages",))]
    chats = [messages for messages in rows if chat.valid(messages)]
    dropped = len(rows) - len(chats)
    return _tulu(chats, paths, *[f"{dropped} rows dropped: not user and assistant in turn"] * bool(dropped))


def _tulu(chats: list[chat.Chat], paths: list[Path], *notes: str) -> Corpus:
    validation, test, train = cut(chats, content, 2)
    return Corpus(train, validation, test, fingerprints(paths), ["validation and test: cut from train", *notes])


RECIPES = {
    "instruct": Recipe("chats", "", None, INSTRUCT, instruct_from_folder),
    "tulu": Recipe("chats", "hub allenai/tulu-3-sft-mixture", tulu_from_hub, TULU, tulu_from_folder),
}
