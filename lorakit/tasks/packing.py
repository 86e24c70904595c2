"""Packing: several conversations a row, positions restarting at each; none attends to or predicts another.

Given `position_ids` and no `attention_mask`, transformers derives a block-diagonal mask from the restarts (full and
sliding layers, sdpa and eager), as long as the model keeps no key-value cache: `config.use_cache = False`, as the
Trainer sets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.tasks.collate import IGNORED, padded

Columns = dict[str, list[list[int]]]


def pack(ids: Sequence[list[int]], labels: Sequence[list[int]], max_length: int) -> Columns:
    """Rows of at most `max_length` tokens, filled in the order given; a conversation is never divided.

    The first token of a conversation has no label: it would be predicted from the one before.
    """
    columns: Columns = {"input_ids": [], "attention_mask": [], "labels": [], "position_ids": []}
    for tokens, targets in zip(ids, labels, strict=True):
        if not columns["input_ids"] or len(columns["input_ids"][-1]) + len(tokens) > max_length:
            for column in columns.values():
                column.append([])
        columns["input_ids"][-1] += tokens
        columns["attention_mask"][-1] += [1] * len(tokens)
        columns["labels"][-1] += [IGNORED, *targets[1:]]
        columns["position_ids"][-1] += range(len(tokens))
    return columns


def apart(ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Columns:
    """One conversation a row."""
    return {"input_ids": list(ids), "attention_mask": [[1] * len(row) for row in ids], "labels": list(labels)}


@dataclass(frozen=True)
class PackedCollator:
    """Pads packed rows; padding is one more document, so that no real token sees it. No `attention_mask`: see above."""

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = padded([row["input_ids"] for row in rows], self.pad_id)
        labels = padded([row["labels"] for row in rows], IGNORED)
        length = ids.shape[1]
        positions = [[*row["position_ids"], *range(length - len(row["position_ids"]))] for row in rows]
        return {"input_ids": ids, "labels": labels, "position_ids": torch.tensor(positions)}
