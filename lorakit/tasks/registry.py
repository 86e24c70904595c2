"""Every task by name: where its text comes from, and how it becomes a `Task`: read, split, subsample, tokenise."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lorakit.assets import hub
from lorakit.errors import DataError, ParameterError, require
from lorakit.settings import DataSettings
from lorakit.tasks import build, conversations, labelled, own, wikitext
from lorakit.tasks.corpus import Corpus, Recipe
from lorakit.tasks.task import JUDGED, SPLITS, Kind, Task, classification_f1
from lorakit.tasks.toy import grammar

RECIPES = labelled.RECIPES | wikitext.RECIPES | conversations.RECIPES | grammar.RECIPES | own.RECIPES
NAMES = tuple(RECIPES)
SHORTEST = 8  # tokens of a row: special tokens and something to learn from


def recipe(name: str) -> Recipe:
    """How task `name` is read."""
    require(name in RECIPES, "task", name, f"must be one of {', '.join(NAMES)}")
    return RECIPES[name]


def kind(name: str, model_kind: str | None = None) -> Kind:
    """What a model must do for task `name`: "classify", "masked" or "causal".

    Args:
        model_kind: "encoder" or "decoder"; plain text is masked for encoders and causal for decoders.

    Raises:
        ParameterError: no such task, or a chat task with an encoder.
    """
    form = recipe(name).form
    if form == "labelled":
        return "classify"
    if form == "chats" and model_kind == "encoder":
        raise ParameterError("task", name, "is generation, which an encoder cannot do; choose a decoder model")
    if form == "documents" and model_kind not in ("encoder", "decoder"):
        raise ParameterError("model_kind", model_kind, "must be encoder or decoder")
    return "masked" if form == "documents" and model_kind == "encoder" else "causal"


def load(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind_of_model: str | None = None,
    seed: int = 0,
    text: tuple[Corpus, str] | None = None,
    **asked: Any,
) -> Task:
    """Read task `name` from `data_files`, else LORAKIT_DATA where it has the task's folder, else hub or package.

    Args:
        kind_of_model: "encoder" or "decoder"; None: an encoder if the tokenizer has a [CLS] token.
        seed: of the masks drawn in training; nothing else depends on it.
        text: what `read` gave, where it was read already.
        asked: of `DataSettings`: data_files; max_length (128), tokens a row has at most; max_train, max_validation,
            max_test, rows kept, 0 for all, the same for every seed and method; packing, several conversations a
            training row.

    Raises:
        ParameterError: unknown task, a value out of range, or a parameter that this task does not have.
        DataError: a file is missing or malformed.
        AssetError: the hub or the package index cannot be reached.
    """
    known, given = recipe(name), DataSettings(**{"max_length": 128} | asked)
    require(given.max_length >= SHORTEST, "max_length", given.max_length, f"must be at least {SHORTEST} tokens")
    require(not given.packing or known.form == "chats", "packing", True, f"is for chat tasks, which {name} is not")
    task_kind = kind(name, kind_of_model or ("decoder" if tokenizer.cls_token_id is None else "encoder"))
    corpus, source = text or read(name, given.data_files, given)
    parts = build.build(corpus, known.form, build.Options(tokenizer, task_kind, given, seed))
    if empty := [split for split in SPLITS if len(parts[split]) == 0]:
        told = [f"at max_length={given.max_length}", *(note for note in parts["notes"] if "dropped" in note)]
        raise DataError(f"task {name}: no rows are left for {', '.join(empty)} {'; '.join(told)}")
    metrics = classification_f1 if known.f1 else JUDGED[task_kind]
    return Task(name, task_kind, metrics=metrics, files=corpus.files, source=source, classes=corpus.classes, **parts)


def read(
    name: str, data_files: str = "", asked: DataSettings | None = None, dataset: Mapping[str, Any] | None = None
) -> tuple[Corpus, str]:
    """The task's text, and in words where it came from; a folder may also be a snapshot of the hub's data set.

    Args:
        asked: of own data, which columns; dataset: split -> rows, in place of its files.
    """
    known, mirror = recipe(name), os.environ.get("LORAKIT_DATA", "")
    base = Path(os.path.expanduser(data_files or mirror))
    require(dataset is None or name in own.RECIPES, "task", name, f"of a dataset must be {', '.join(own.RECIPES)}")
    if name in own.RECIPES:
        mapped = dataset is None or isinstance(dataset, Mapping)
        require(mapped, "dataset", type(dataset).__name__, "must be split -> rows, as a DatasetDict")
        alone = bool(data_files) != (dataset is not None)
        require(alone, "data_files", data_files, f"with task {name} must be {own.LAYOUT}; or empty, with a dataset")
        return own.read(name, base, asked or DataSettings(), dataset), "own data"
    if known.from_folder is None:
        require(not data_files, "data_files", data_files, f"must be empty: task {name} is {known.origin}")
    elif data_files and not os.path.isdir(base):
        raise DataError(f"data_files={data_files!r}: no such folder; expected layout: {known.layout}")
    elif data_files or (mirror and os.path.isdir(base / name)):
        whose = "data_files" if data_files else "LORAKIT_DATA"
        folder = base / name if (base / name).is_dir() else base
        for place in dict.fromkeys((folder, base)) if known.origin.startswith("hub") else ():
            with contextlib.suppress(hub.NoSnapshot):
                return known.elsewhere(place), f"{known.origin}, its snapshot in {whose}"
        return known.from_folder(folder), f"files of {whose}"
    if known.elsewhere is None:
        raise DataError(f"task {name} is read from data_files (or LORAKIT_DATA) only; expected layout: {known.layout}")
    return known.elsewhere(), known.origin
