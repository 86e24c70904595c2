"""A corpus and a tokenizer become datasets and collators, one way for each form of row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from lorakit.head import IGNORED
from lorakit.tasks import chat, collate
from lorakit.tasks.collate import Columns, PadCollator
from lorakit.tasks.corpus import Corpus, Labelled, shuffled
from lorakit.tasks.exact_match import gsm8k_answer
from lorakit.tasks.task import SPLITS, Kind

Parts = dict[str, Any]  # fields of `Task`
SHORTEST_BLOCK = 4  # ordinary tokens a block must have


@dataclass(frozen=True)
class Options:
    """What `tasks.load` was told about rows: see there."""

    tokenizer: PreTrainedTokenizerFast
    kind: Kind
    max_length: int
    limits: dict[str, int]  # of a split's rows in hash order; 0: all
    seed: int
    packing: bool


def classification(corpus: Corpus, options: Options) -> Parts:
    """One labelled text, or pair, a row."""
    pad = PadCollator(options.tokenizer.pad_token_id)
    parts: Parts = {"collator": pad, "eval_collator": pad, "notes": list(corpus.notes)}
    for split in SPLITS:
        rows = shuffled(getattr(corpus, split))[: options.limits[split] or None]
        columns = labelled_columns(rows, options.tokenizer, options.max_length) if rows else {"labels": []}
        made = Dataset.from_dict(columns)
        if any(empty := [not ids for ids in columns.get("input_ids", [])]):
            made = made.select([place for place, none in enumerate(empty) if not none])
            parts["notes"].append(f"{split}: {sum(empty)} of {len(rows)} rows dropped, their text has no token")
        if len(classes := {*made["labels"]}) == 1:
            parts["notes"].append(f"{split}: all {len(made)} rows are of class {classes.pop()}")
        parts[split] = made
    return parts


def labelled_columns(rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerFast, max_length: int) -> Columns:
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


def language_model(corpus: Corpus, options: Options) -> Parts:
    """One block of a document a row: every token after its first predicted, or (for an encoder) those masked."""
    tokenizer, pad, masked = options.tokenizer, PadCollator(options.tokenizer.pad_token_id), options.kind == "masked"
    collator = collate.MaskCollator(pad, collate.Masker(tokenizer, options.seed)) if masked else pad
    parts: Parts = {"collator": collator, "eval_collator": pad, "notes": corpus.notes}
    for split in SPLITS:
        rows = blocks(getattr(corpus, split), tokenizer, options.max_length)[: options.limits[split] or None]
        columns = {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}
        if not masked:
            columns["labels"] = [[IGNORED, *ids[1:]] for ids in rows]
        elif split != "train":  # of training rows the collator masks others for every batch
            columns["input_ids"], columns["labels"] = collate.masked_once(rows, tokenizer)
        parts[split] = Dataset.from_dict(columns)
    return parts


def blocks(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    """Token ids of all documents in hash order, cut into blocks, each between the tokenizer's own special tokens.

    A block has at most `max_length` tokens and never spans two documents.
    """
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    before, after = whole[:start], whole[start + len(bare) :]  # [CLS] and [SEP], or <bos> and nothing
    room = max_length - len(before) - len(after)
    ordered = shuffled(documents)
    encoded = tokenizer(ordered, add_special_tokens=False, verbose=False)["input_ids"] if ordered else []
    pieces = [ids[start : start + room] for ids in encoded for start in range(0, len(ids), room)]
    return [[*before, *piece, *after] for piece in pieces if len(piece) >= min(SHORTEST_BLOCK, room)]


def conversation(corpus: Corpus, options: Options) -> Parts:
    """One chat a row; with packing, several a training row."""
    pad = PadCollator(options.tokenizer.pad_token_id)
    collator = collate.PackedCollator(pad.pad_id) if options.packing else pad
    parts: Parts = {"collator": collator, "eval_collator": pad, "notes": list(corpus.notes), "answers": {}}
    for split in SPLITS:
        chats = shuffled(getattr(corpus, split))[: options.limits[split] or None]
        ids, labels = chat.encode(chats, options.tokenizer, options.max_length)
        if cut := len(chats) - len(ids):
            reason = f"no answer within {options.max_length} tokens"
            parts["notes"].append(f"{split}: {cut} of {len(chats)} chats dropped, {reason}")
        columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
        if options.packing and split == "train":
            columns = collate.pack(ids, labels, options.max_length)
        parts[split] = Dataset.from_dict(columns)
        answers = [(chat.prompt(messages), messages[-1]["content"]) for messages in chats]
        parts["answers"][split] = [row for row in answers if gsm8k_answer(row[1]) is not None]
    return parts


BUILDERS = {"labelled": classification, "documents": language_model, "chats": conversation}
