"""Documents to blocks of at most `max_length` tokens; a block never spans two documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.tasks import masking, splits
from lorakit.tasks.collate import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHORTEST = 4  # ordinary tokens a block must have


def blocks(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    """Token ids of all documents in hash order, cut into blocks, each between the tokenizer's own special tokens."""
    ordered = splits.shuffled(documents, str)
    before, after = special_tokens(tokenizer)
    room = max_length - len(before) - len(after)
    encoded = tokenizer(ordered, add_special_tokens=False, verbose=False)["input_ids"] if ordered else []
    pieces = [ids[start : start + room] for ids in encoded for start in range(0, len(ids), room)]
    return [[*before, *piece, *after] for piece in pieces if len(piece) >= min(SHORTEST, room)]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """What the tokenizer writes before and after a text: [CLS] and [SEP], or <bos> and nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def causal_columns(rows: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> dict[str, list]:
    """Every token after the first is predicted from those before it in its block."""
    return {"input_ids": rows, "attention_mask": _ones(rows), "labels": [[IGNORED, *ids[1:]] for ids in rows]}


def masked_train_columns(rows: list[list[int]]) -> dict[str, list]:
    """No labels: the collator masks anew for every batch."""
    return {"input_ids": rows, "attention_mask": _ones(rows)}


def masked_eval_columns(rows: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> dict[str, list]:
    ids, labels = masking.fixed(rows, tokenizer)
    return {"input_ids": ids, "attention_mask": _ones(rows), "labels": labels}


def _ones(rows: list[list[int]]) -> list[list[int]]:
    return [[1] * len(ids) for ids in rows]
