"""A corpus and a tokenizer become datasets and collators, one way for each form of row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.tasks import chat, conversations, labelled, language, masking, packing, splits
from lorakit.tasks.collate import PadCollator
from lorakit.tasks.corpus import Corpus
from lorakit.tasks.exact_match import gsm8k_answer
from lorakit.tasks.task import SPLITS, Kind

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Columns = dict[str, list]
Parts = dict[str, Any]  # fields of `Task`


@dataclass(frozen=True)
class Options:
    """What `tasks.load` was told about rows: see there."""

    tokenizer: PreTrainedTokenizerFast
    kind: Kind
    max_length: int
    limits: dict[str, int]
    seed: int
    packing: bool

    def chosen(self, rows: list[Any], split: str, text: Callable[[Any], str]) -> list[Any]:
        """Rows in hash order, cut to the split's limit."""
        return splits.shuffled(rows, text)[: self.limits[split] or None]


def dataset(columns: Columns) -> Dataset:
    """Columns in memory, without cache files."""
    from datasets import Dataset

    return Dataset.from_dict(columns)


def classification(corpus: Corpus, options: Options) -> Parts:
    pad = PadCollator(options.tokenizer.pad_token_id)
    parts: Parts = {"collator": pad, "eval_collator": pad, "notes": corpus.notes}
    for split in SPLITS:
        rows = options.chosen(getattr(corpus, split), split, lambda row: f"{row.text}\t{row.pair}")
        parts[split] = dataset(labelled.columns(rows, options.tokenizer, options.max_length))
    return parts


def language_model(corpus: Corpus, options: Options) -> Parts:
    tokenizer, pad = options.tokenizer, PadCollator(options.tokenizer.pad_token_id)
    masked = options.kind == "masked"
    collator = masking.MaskCollator(pad, masking.masker(tokenizer, options.seed)) if masked else pad
    parts: Parts = {"collator": collator, "eval_collator": pad, "notes": corpus.notes}
    for split in SPLITS:
        rows = language.blocks(getattr(corpus, split), tokenizer, options.max_length)[: options.limits[split] or None]
        if not masked:
            columns = language.causal_columns(rows, tokenizer)
        elif split == "train":
            columns = language.masked_train_columns(rows)
        else:
            columns = language.masked_eval_columns(rows, tokenizer)
        parts[split] = dataset(columns)
    return parts


def conversation(corpus: Corpus, options: Options) -> Parts:
    pad = PadCollator(options.tokenizer.pad_token_id)
    collator = packing.PackedCollator(pad.pad_id) if options.packing else pad
    parts: Parts = {"collator": collator, "eval_collator": pad, "notes": list(corpus.notes), "answers": {}}
    for split in SPLITS:
        chats = options.chosen(getattr(corpus, split), split, conversations.question)
        ids, labels = chat.encode(chats, options.tokenizer, options.max_length)
        if cut := len(chats) - len(ids):
            parts["notes"].append(
                f"{split}: {cut} of {len(chats)} chats dropped, no answer within {options.max_length} tokens"
            )
        packed = options.packing and split == "train"
        parts[split] = dataset(packing.pack(ids, labels, options.max_length) if packed else packing.apart(ids, labels))
        parts["answers"][split] = [row for row in map(_answer_row, chats) if gsm8k_answer(row[1]) is not None]
    return parts


def _answer_row(messages: conversations.Chat) -> tuple[str, str]:
    return chat.prompt(messages), messages[-1]["content"]


BUILDERS = {"labelled": classification, "documents": language_model, "chats": conversation}
