"""Labelled texts and pairs of texts to token ids, in one call of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.tasks.corpus import Labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def columns(rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerFast, max_length: int) -> dict[str, list]:
    """`input_ids`, `attention_mask`, `labels` (classes), and `token_type_ids` where they tell a pair's texts apart."""
    texts, pairs = [row.text for row in rows], [row.pair for row in rows]
    if any(pairs) and tokenizer.sep_token_id is None:  # a decoder's template would run the two texts together
        texts, pairs = [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)], []
    arguments = (texts, pairs) if any(pairs) else (texts,)
    encoded = tokenizer(*arguments, truncation=True, max_length=max_length, verbose=False)
    kept = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if any(map(any, encoded.get("token_type_ids", []))):
        kept["token_type_ids"] = encoded["token_type_ids"]
    return kept | {"labels": [row.label for row in rows]}
