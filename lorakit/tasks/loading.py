"""A task's name and a tokenizer become a `Task`: read, split, subsample, tokenise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import DataError, require
from lorakit.tasks import build, metrics, registry
from lorakit.tasks.corpus import Corpus
from lorakit.tasks.task import SPLITS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

JUDGED = {  # kind -> metrics, main metric
    "classify": (metrics.classification, "accuracy"),
    "masked": (metrics.masked, "masked_perplexity"),
    "causal": (metrics.causal, "perplexity"),
}
SHORTEST = 8  # tokens of a row: special tokens and something to learn from


def load(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind_of_model: str | None = None,
    data_dir: str = "",
    max_length: int = 128,
    max_train: int = 0,
    max_validation: int = 0,
    max_test: int = 0,
    seed: int = 0,
    packing: bool = False,
) -> Task:
    """Read task `name` from `data_dir`, else LORAKIT_DATA where it has the task's folder, else the hub or the package.

    Args:
        kind_of_model: "encoder" or "decoder"; None: an encoder if the tokenizer has a [CLS] token.
        max_length: tokens a row has at most.
        max_train, max_validation, max_test: rows kept, 0 for all; the same rows for every seed and method.
        seed: of the masks drawn in training; nothing else depends on it.
        packing: chat tasks: several conversations a training row.

    Raises:
        ParameterError: unknown task, a value out of range, or a parameter that this task does not have.
        DataError: a file is missing or malformed.
        AssetError: the hub or the package index cannot be reached.
    """
    recipe = registry.recipe(name)
    limits = dict(zip(SPLITS, (max_train, max_validation, max_test), strict=True))
    for split, limit in limits.items():
        require(limit >= 0, f"max_{split}", limit, "must be 0 (all) or more")
    require(max_length >= SHORTEST, "max_length", max_length, f"must be at least {SHORTEST} tokens")
    require(not packing or recipe.form == "chats", "packing", packing, f"is for chat tasks, which {name} is not")
    kind = registry.kind(name, kind_of_model or _family(tokenizer))
    corpus, source = read(name, data_dir)
    parts = build.BUILDERS[recipe.form](corpus, build.Options(tokenizer, kind, max_length, limits, seed, packing))
    if empty := [split for split in SPLITS if len(parts[split]) == 0]:
        raise DataError(f"task {name}: no rows are left for {', '.join(empty)} at max_length={max_length}")
    judge, main = (metrics.classification_f1, "f1") if recipe.f1 else JUDGED[kind]
    known = {"num_labels": 2, "metrics": judge, "main_metric": main, "files": corpus.files, "source": source}
    return Task(name=name, kind=kind, **known, **parts)


def _family(tokenizer: PreTrainedTokenizerFast) -> str:
    return "decoder" if tokenizer.cls_token_id is None else "encoder"


def read(name: str, data_dir: str = "") -> tuple[Corpus, str]:
    """The task's text, and in words where it came from."""
    recipe = registry.recipe(name)
    if recipe.from_folder is None:
        require(not data_dir, "data_dir", data_dir, f"must be empty: task {name} is {recipe.origin}")
    elif folder := _folder(name, data_dir, recipe.layout):
        return recipe.from_folder(folder), f"files of {'data_dir' if data_dir else 'LORAKIT_DATA'}"
    return recipe.elsewhere(), recipe.origin


def _folder(name: str, data_dir: str, layout: str) -> Path | None:
    """Where the task's files must be, `data_dir/name` or `data_dir` itself; None: nowhere local."""
    if data_dir:
        base = Path(data_dir).expanduser()
        if not base.is_dir():
            raise DataError(f"data_dir={data_dir!r}: no such folder; expected layout: {layout}")
        return base / name if (base / name).is_dir() else base
    mirror = os.environ.get("LORAKIT_DATA", "")
    folder = Path(mirror).expanduser() / name
    return folder if mirror and folder.is_dir() else None
