"""Chats of more rows than memory holds: written once to the cache of `datasets` as Arrow, and read from there mapped.

Which row is where is decided as by `corpus.cut`, of 8 bytes a row.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from lorakit.errors import DataError
from lorakit.tasks import chat
from lorakit.tasks.corpus import Corpus, content, cut_places, fingerprints, place

FEATURES = Features({"place": Value("int64"), "chat": Value("string")})


def corpus_of(paths: list[Path], read: Callable[[Path], Iterable[chat.Chat]]) -> Corpus:
    """The chats that `read` finds in the files: held-out ones as lists, `train` as a `Dataset` of JSON in hash order.

    Raises:
        DataError: as `read` does; too few different rows; the cache cannot be written.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for path in paths:
            for messages in read(path):
                yield {"place": place(content(messages)), "chat": json.dumps(messages)}

    files, code = fingerprints(paths), fingerprints(sorted(Path(__file__).parent.glob("*.py")))
    try:  # what is there of the same files, read by the same code, is not written again
        stored = Dataset.from_generator(
            rows, features=FEATURES, fingerprint=Hasher.hash([files, code, read.__qualname__])
        )
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        told = f"the cache of datasets (HF_DATASETS_CACHE) cannot be written: {cause}"
        raise cause if isinstance(cause, DataError) else DataError(told) from None
    *held, train = cut_places(places := stored.with_format("numpy")["place"][:], 2, np.ones(len(places)))
    validation, test = ([*map(json.loads, stored.select(part)["chat"])] for part in held)
    return Corpus(stored.select(train), validation, test, files, ["validation and test: cut from train"])
