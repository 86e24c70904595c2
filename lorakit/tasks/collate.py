"""Rows to one batch: right-padded to the longest row, rounded up to a multiple of 8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100  # a label nothing is predicted for
MULTIPLE = 8


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(B, T) int64, T the longest row rounded up to a multiple of 8."""
    length = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


@dataclass(frozen=True)
class PadCollator:
    """Model inputs of rows with `input_ids`, `attention_mask`, perhaps `token_type_ids`, and perhaps `labels`.

    A row's label is a class, giving labels (B,), or token ids, giving labels (B, T) padded with -100.
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        values = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0}
        batch = {name: padded([row[name] for row in rows], value) for name, value in values.items() if name in rows[0]}
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            batch["labels"] = torch.tensor(labels) if isinstance(labels[0], int) else padded(labels, IGNORED)
        return batch
