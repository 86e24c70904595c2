"""Chats of more rows than memory holds: written once to the cache of `datasets` as Arrow, and read from there mapped.

Which row is where is decided as by `corpus.cut`, of 8 bytes a row.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.utils import logging

from lorakit.errors import DataError
from lorakit.files import written
from lorakit.progress import Progress
from lorakit.tasks import chat
from lorakit.tasks.corpus import Corpus, content, cut_places, fingerprints, place

FEATURES = Features({"place": Value("int64"), "chat": Value("string")})


def corpus_of(paths: list[Path], read: Callable[[Path], Iterable[chat.Chat]]) -> Corpus:
    """The chats that `read` finds in the files: held-out ones as lists, `train` as a `Dataset` of JSON in hash order.

    Raises:
        DataError: as `read` does; no or too few different rows; files that change meanwhile; see `_cache`.
    """
    files, code = fingerprints(paths), fingerprints(sorted(Path(__file__).parent.glob("*.py")))

    def rows() -> Iterator[dict[str, Any]]:
        messages = None
        for path in paths:
            for messages in read(path):
                turns = [{name: turn[name] for name in ("role", "content")} for turn in messages]
                yield {"place": place(content(messages)), "chat": json.dumps(turns)}
        if messages is None:
            raise DataError(f"no rows that are chats in {', '.join(files)}")
        if fingerprints(paths) != files:
            raise DataError(f"{', '.join(files)}: changed while they were read")

    key = Hasher.hash([files, code, read.__qualname__])
    with _cache():  # what is there of the same files, read by the same code, is not written again
        stored = Dataset.from_generator(rows, features=FEATURES, fingerprint=key)
        *held, train = cut_places(places := stored.with_format("numpy")["place"][:], 2, np.ones(len(places)))
        validation, test = ([*map(json.loads, stored.select(part)["chat"])] for part in held)
    return Corpus(stored.select(train), validation, test, files, ["validation and test: cut from train"])


def tokenised(rows: Dataset, told: list[Any], columns: Callable[[list[chat.Chat]], dict[str, list]]) -> Dataset:
    """What `columns` makes of so many chats of `corpus_of` at a time, beside them; `told` is all that it depends on.

    Raises:
        DataError: see `_cache`.
    """

    def made(batch: dict[str, list[str]]) -> dict[str, list]:
        found = columns([json.loads(text) for text in batch["chat"]])
        return {name: [np.asarray(row, "int32") for row in column] for name, column in found.items()}

    folder = Path(rows.cache_files[0]["filename"]).parent
    kept = folder / f"tokens-{Hasher.hash([rows._fingerprint, *told])}.arrow"
    with _cache():
        if not kept.exists():
            with written(kept) as file:
                rows.map(
                    made, batched=True, batch_size=2000, remove_columns=rows.column_names, cache_file_name=str(file)
                )
        return Dataset.from_file(str(kept))


@contextmanager
def _cache() -> Iterator[None]:
    """Inside, `datasets` shows its bars where ours are shown.

    Raises:
        DataError: its cache cannot be written or read.
    """
    shown = logging.is_progress_bar_enabled()
    if Progress("", 1, "").style != "bar":
        logging.disable_progress_bar()
    try:
        yield
    except (DatasetGenerationError, OSError, pyarrow.ArrowException) as error:
        cause = error.__cause__ or error
        if not isinstance(cause, OSError | pyarrow.ArrowException):
            raise cause from None
        told = "the cache of datasets (HF_DATASETS_CACHE) cannot be written or read, is the disk full or it damaged?"
        raise DataError(f"{told} {cause}") from None
    finally:
        if shown:
            logging.enable_progress_bar()
