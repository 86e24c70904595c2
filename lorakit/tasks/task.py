"""A task is three splits of token ids, two collators, a metric, and an account of what was read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset

Kind = Literal["classify", "masked", "causal"]
Batch = dict[str, "torch.Tensor"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """What a run trains and is judged on.

    Attributes:
        train, validation, test: datasets with columns `input_ids`, `attention_mask` and `labels`: a class for
            "classify"; token ids, -100 where nothing is predicted, for "causal" and for "masked" (whose training rows
            have none: the collator masks). Extra columns are for metrics; the collators ignore them.
        collator: training rows -> batch, right-padded to a multiple of 8. With packing the batch has `position_ids` and
            no `attention_mask`: documents are kept apart by the restarting positions, provided the model runs without a
            key-value cache (`config.use_cache = False`, as the Trainer sets it).
        eval_collator: validation and test rows -> batch, right-padded to a multiple of 8.
        metrics: statistics (N, 4), one row per example (summed loss in nats, valid labels, prediction, label; for
            language models the number of tokens predicted right and the number of labels) -> metrics by name.
        files: sha256 by name of every file read.
        source: where the rows came from.
        notes: what a reader of the results must know.
        classes: their names, where the data say them.
        answers: (prompt text, answer) of the test split's chats whose answer ends in `#### N`.
    """

    name: str
    kind: Kind
    train: Dataset
    validation: Dataset
    test: Dataset
    collator: Callable[[list[dict[str, Any]]], Batch]
    eval_collator: Callable[[list[dict[str, Any]]], Batch]
    metrics: Callable[[np.ndarray], dict[str, float]]
    files: Mapping[str, str]
    source: str
    notes: Sequence[str] = ()
    answers: Sequence[tuple[str, str]] = ()
    classes: Sequence[str] = ()


# metrics -------------------------------------------------------------------------------------------


def classification(stats: np.ndarray) -> dict[str, float]:
    """Loss per example and accuracy."""
    loss = float(stats[:, 0].sum() / stats[:, 1].sum())
    return {"loss": loss, "accuracy": float((stats[:, 2] == stats[:, 3]).mean())}


def classification_f1(stats: np.ndarray) -> dict[str, float]:
    """As `classification`, and F1 of class 1: 2 TP / (2 TP + FP + FN), 0 where there is no such row."""
    predicted, actual = stats[:, 2] == 1, stats[:, 3] == 1
    hits, wrong = (predicted & actual).sum(), (predicted != actual).sum()
    return classification(stats) | {"f1": float(2 * hits / (2 * hits + wrong)) if hits else 0.0}


def language_model(stats: np.ndarray, perplexity: str = "perplexity") -> dict[str, float]:
    """Loss per predicted token, its exponential (under the name `perplexity`), and the share predicted right."""
    loss = float(stats[:, 0].sum() / stats[:, 1].sum())
    with np.errstate(over="ignore"):
        exponential = float(np.exp(loss))
    return {"loss": loss, perplexity: exponential, "token_accuracy": float(stats[:, 2].sum() / stats[:, 3].sum())}


def masked(stats: np.ndarray) -> dict[str, float]:
    """As `language_model` over masked tokens; the exponential is called `masked_perplexity`.

    It is over the 15 % of tokens that the fixed evaluation masks hide, many at once: neither a language model's
    perplexity nor a pseudo-perplexity, which hides one token at a time (Salazar et al. 2020).
    """
    return language_model(stats, "masked_perplexity")


JUDGED = {"classify": classification, "masked": masked, "causal": language_model}  # kind -> metrics
