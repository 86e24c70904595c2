"""Text as bytes, cut into rows: the target at each position is the byte that comes next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lorakit.errors import DataError, require

VOCAB_SIZE = 256


def byte_rows(texts: Sequence[str], length: int) -> Tensor:
    """The texts, one a line, as rows (N, length + 1) of UTF-8 bytes; what does not fill a last row is dropped.

    Each row begins with the last byte of the row before, so that every byte but the first is a target once.

    Raises:
        ParameterError: length < 1.
        DataError: the texts do not fill one row.
    """
    require(length >= 1, "length", length, "must be >= 1")
    data = torch.frombuffer(bytearray("\n".join(texts).encode()) or bytearray(1), dtype=torch.uint8).long()
    if len(data) <= length:
        raise DataError(f"the texts have {len(data)} bytes, fewer than a row of {length} + 1")
    return data.unfold(0, length + 1, length)


def byte_loader(
    texts: Sequence[str], length: int, batch_size: int, shuffle: bool = False, seed: int = 0
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of (input_ids, labels), each (B, length); two loaders of one seed shuffle alike.

    Raises:
        ParameterError: length or batch_size below 1.
        DataError: the texts do not fill one row.
    """
    require(batch_size >= 1, "batch_size", batch_size, "must be >= 1")
    rows = byte_rows(texts, length)
    generator = torch.Generator().manual_seed(seed)
    dataset = TensorDataset(rows[:, :-1], rows[:, 1:])
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator)
