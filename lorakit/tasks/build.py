"""A corpus and a tokenizer become datasets and collators, one way for each form of row."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from lorakit.head import IGNORED
from lorakit.settings import DataSettings
from lorakit.tasks import chat, collate, shards
from lorakit.tasks.collate import Columns
from lorakit.tasks.corpus import Corpus, Labelled, shuffled
from lorakit.tasks.exact_match import gsm8k_answer
from lorakit.tasks.task import SPLITS, Kind

Parts = dict[str, Any]  # fields of `Task`
Made = tuple[Columns, list[str]]  # of one split, with notes
SHORTEST_BLOCK = 4  # ordinary tokens a block must have


class Options(NamedTuple):
    """What `tasks.load` was told about rows: see there."""

    tokenizer: PreTrainedTokenizerFast
    kind: Kind
    asked: DataSettings
    seed: int


def build(corpus: Corpus, form: str, options: Options) -> Parts:
    """Datasets, collators, notes and answers of a corpus whose rows are of this form (see `corpus.Recipe`)."""
    tokenizer, pad = options.tokenizer, collate.PadCollator(options.tokenizer.pad_token_id)
    masker = collate.Masker(tokenizer, options.seed) if options.kind == "masked" else None
    collator = (collate.PackedCollator if options.asked.packing else collate.PadCollator)(pad.pad_id, masker)
    parts: Parts = {"collator": collator, "eval_collator": pad, "notes": list(corpus.notes)}
    for split in SPLITS:
        rows, most = getattr(corpus, split), getattr(options.asked, f"max_{split}")  # in hash order
        if isinstance(rows, Dataset):
            parts[split], notes = on_disk(rows.take(min(most or len(rows), len(rows))), options)
        else:
            rows = blocks(rows, tokenizer, options.asked.max_length) if form == "documents" else shuffled(rows)
            rows = rows[: most or None]
            columns, notes = FORMS[form](rows, options, split == "train")
            parts[split] = Dataset.from_dict(columns)
        parts["notes"] += [f"{split}: {note}" for note in notes]
        if form == "chats" and split == "test":
            answers = [(chat.prompt(messages), messages[-1]["content"]) for messages in rows]
            parts["answers"] = [row for row in answers if gsm8k_answer(row[1]) is not None]
    return parts


def classification(rows: Sequence[Labelled], options: Options, train: bool) -> Made:
    """One labelled text, or pair, a row."""
    room = options.asked.max_length
    columns = labelled_columns(rows, options.tokenizer, room) if rows else {"input_ids": [], "labels": []}
    kept = [place for place, ids in enumerate(columns["input_ids"]) if ids]
    columns = {name: [column[place] for place in kept] for name, column in columns.items()}
    notes = [f"{len(rows) - len(kept)} of {len(rows)} rows dropped, their text has no token"] * (len(kept) < len(rows))
    if len(classes := {*columns["labels"]}) == 1:
        notes.append(f"all {len(kept)} rows are of class {classes.pop()}")
    return columns, notes


def labelled_columns(rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerFast, max_length: int) -> Columns:
    """`input_ids`, `attention_mask`, `labels` (classes), and `token_type_ids` where they tell a pair's texts apart."""
    texts, pairs = [row.text for row in rows], [row.pair for row in rows]
    if any(pairs) and tokenizer.sep_token_id is None:  # a decoder's template would run the two texts together
        texts, pairs = [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)], []
    encoded = tokenizer(texts, pairs if any(pairs) else None, truncation=True, max_length=max_length, verbose=False)
    kept = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if any(map(any, encoded.get("token_type_ids", []))):
        kept["token_type_ids"] = encoded["token_type_ids"]
    return kept | {"labels": [row.label for row in rows]}


def language_model(rows: list[list[int]], options: Options, train: bool) -> Made:
    """One block of a document a row: every token after its first predicted, or (for an encoder) those masked."""
    columns = {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}
    if options.kind == "causal":
        columns["labels"] = [[IGNORED, *ids[1:]] for ids in rows]
    elif not train:  # of training rows the collator masks others for every batch
        columns["input_ids"], columns["labels"] = collate.masked_once(rows, options.tokenizer)
    return columns, []


def blocks(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    """Token ids of all documents in hash order, cut into blocks, each between the tokenizer's own special tokens.

    A block has at most `max_length` tokens and never spans two documents.
    """
    special = tokenizer.num_special_tokens_to_add()  # [CLS] and [SEP], or <bos>
    ordered, divided = shuffled(documents), {"truncation": True, "return_overflowing_tokens": True}
    made = tokenizer(ordered, max_length=max_length, verbose=False, **divided)["input_ids"] if ordered else []
    return [ids for ids in made if len(ids) >= min(special + SHORTEST_BLOCK, max_length)]


def conversation(rows: Sequence[chat.Chat], options: Options, train: bool) -> Made:
    """One chat a row; with packing, several a training row."""
    ids, labels = chat.encode(rows, options.tokenizer, options.asked.max_length)
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    if options.asked.packing and train:
        columns = collate.pack(ids, labels, options.asked.max_length)
    return columns, _dropped(len(rows), len(ids), options)


def _dropped(rows: int, kept: int, options: Options) -> list[str]:
    room = options.asked.max_length
    return [f"{rows - kept} of {rows} chats dropped, no answer within {room} tokens"] * (kept < rows)


def on_disk(rows: Dataset, options: Options) -> tuple[Dataset, list[str]]:
    """`conversation` of training rows that `shards` stored."""
    words = copy.deepcopy(options.tokenizer.backend_tokenizer)
    words.no_truncation()  # states of its last call
    words.no_padding()
    told = [words.to_str(), words.encode_special_tokens, options.tokenizer.bos_token_id]
    told += [options.asked.max_length, options.asked.packing]
    stored = shards.tokenised(rows, told, lambda chats: conversation(chats, options, True)[0])
    kept = sum(row.count(0) for row in stored["position_ids"]) if options.asked.packing else len(stored)
    return stored, _dropped(len(rows), kept, options)


FORMS = {"labelled": classification, "documents": language_model, "chats": conversation}
