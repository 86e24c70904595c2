"""A task is three splits of token ids, two collators, a metric, and an account of what was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
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
        answers: split -> (prompt text, answer) of chat rows whose answer ends in `#### N`.
    """

    name: str
    kind: Kind
    num_labels: int
    train: Dataset
    validation: Dataset
    test: Dataset
    collator: Callable[[list[dict[str, Any]]], Batch]
    eval_collator: Callable[[list[dict[str, Any]]], Batch]
    metrics: Callable[[np.ndarray], dict[str, float]]
    main_metric: str
    files: Mapping[str, str]
    source: str
    notes: Sequence[str] = ()
    answers: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)

    def answer_rows(self, split: str = "test", count: int = 0) -> list[tuple[str, str]]:
        """The first `count` (0: all) GSM8K-style rows of `split`, each (prompt text, answer); there may be none."""
        rows = list(self.answers.get(split, ()))
        return rows[:count] if count else rows
