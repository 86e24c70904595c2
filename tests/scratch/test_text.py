"""Text as rows of bytes: every byte a target once, the same order for the same seed."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import DataError, ParameterError
from lorakit.scratch import byte_loader, byte_rows

TEXT = ["the quick brown fox", "jumps over the lazy dog"] * 8


def test_every_byte_is_a_target_once():
    rows = byte_rows(["abcd", "efgh"], 3)
    assert [bytes(row.tolist()) for row in rows] == [b"abcd", b"d\nef"]
    assert bytes(byte_rows(["é"], 1)[0].tolist()).decode() == "é"


def test_loaders_of_one_seed_shuffle_alike_and_labels_are_the_next_byte():
    one, two, other = (byte_loader(TEXT, 16, 4, shuffle=True, seed=seed) for seed in (1, 1, 2))
    pairs = list(zip(one, two, strict=True))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)
    assert not torch.equal(pairs[0][0][0], next(iter(other))[0])
    for (ids, labels), _ in pairs:
        assert torch.equal(ids[:, 1:], labels[:, :-1])


@pytest.mark.parametrize("texts", [[], ["short"]])
def test_too_little_text_is_an_error(texts):
    with pytest.raises(DataError, match="fewer than a row"):
        byte_rows(texts, 16)


def test_sizes_below_one_are_refused():
    with pytest.raises(ParameterError, match="length=0"):
        byte_rows(TEXT, 0)
    with pytest.raises(ParameterError, match="batch_size=0"):
        byte_loader(TEXT, 16, 0)
