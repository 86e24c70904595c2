"""What the toy models were pre-trained to guess: masked words and emoticons (encoder), or the next byte (decoder).

The encoder's [CLS] guesses the emoticon a review was posted with, as people's own emoticons teach real models (Go et
al. 2009; DeepMoji, Felbo et al. 2017). It is wrong in one review of seven, and no label is ever shown.
The training loop is `scripts/pretrain_toy.py`; here are its texts, its batches and the loss on held-out text.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from lorakit.tasks.toy.grammar import chats, posted_reviews, reviews, split_seed, stories
from lorakit.tasks.toy.models import folder, tokenizer
from lorakit.tasks.toy.review_grammar import OPINION_WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MASK_OPINION, MASK_OTHER = 0.15, 0.02  # chance that a word is to be guessed
MASK_BYTE = 0.04  # chance of any byte outside those words: it teaches spelling, which whole words build on
HIDDEN = 0.9  # of the chosen places; the others stay readable and are guessed all the same
IGNORED = -100
HELDOUT_ROWS = 96
KINDS = {
    "toy-encoder": ("posted reviews",) * 7 + ("stories",),
    "toy-decoder": ("stories", "reviews", "chats"),
}

Batch = dict[str, torch.Tensor]
_tokenizer = cache(tokenizer)


def texts(kind: str, count: int, seed: int) -> list[str]:
    """Unlabelled text; chats are in turn format, without the leading <bos>.

    Each leaves out what its task asks for, so that fine-tuning has something to learn: the labels of reviews, the
    gifts in stories, the multiplications in chats.
    """
    if kind == "posted reviews":
        return posted_reviews(count, seed)
    if kind == "reviews":
        return [text for text, _ in reviews(count, seed)]
    if kind == "stories":
        return stories(count, seed, gifts=False)
    template = _tokenizer("toy-decoder")
    rendered = (template.apply_chat_template(chat, tokenize=False) for chat in chats(count, seed, products=False))
    return [text.removeprefix("<bos>") for text in rendered]


Span = tuple[int, int]


def masked_spans(text: str, rng: random.Random) -> list[Span]:
    """(first byte, end) of what is to be guessed: whole words, opinions above all, and single bytes elsewhere."""
    chosen = []
    for piece in re.finditer(r"[A-Za-z]+|.", text):
        start, end = piece.span()
        if rng.random() < (MASK_OPINION if piece.group() in OPINION_WORDS else MASK_OTHER):
            chosen.append((start, end))
        else:
            chosen += [(byte, byte + 1) for byte in range(start, end) if rng.random() < MASK_BYTE]
    return chosen


def emoticon(text: str) -> tuple[str, str]:
    """A posted review without its emoticon, and the emoticon's mouth; "" for a text without."""
    posted = re.fullmatch(r"(.*) :([()])", text)
    return (posted[1], posted[2]) if posted else (text, "")


def masked_batch(rows: list[str], encode: PreTrainedTokenizerFast, rng: random.Random) -> Batch:
    """input_ids, attention_mask and labels, each (B, T), of ASCII texts with words and bytes masked.

    The label of [CLS] is the mouth of the emoticon, which is taken off the text.
    """
    posted = [emoticon(text) for text in rows]
    batch = dict(encode([text for text, _ in posted], padding=True, truncation=True, return_tensors="pt"))
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, (text, mouth) in enumerate(posted):
        if mouth:
            labels[row, 0] = encode.convert_tokens_to_ids(mouth)
        for start, end in masked_spans(text, rng):
            place = slice(start + 1, min(end + 1, labels.shape[1] - 1))  # one [CLS] before the text
            labels[row, place] = batch["input_ids"][row, place]
            if rng.random() < HIDDEN:
                batch["input_ids"][row, place] = encode.mask_token_id
    return batch | {"labels": labels}


def causal_batch(rows: list[str], encode: PreTrainedTokenizerFast) -> Batch:
    """input_ids, attention_mask and labels, each (B, T); every text ends with <eos>."""
    batch = dict(encode([row + encode.eos_token for row in rows], padding=True, truncation=True, return_tensors="pt"))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


def batch_of(name: str, kind: str, rows: list[str], rng: random.Random) -> Batch:
    """One batch of texts for the toy model of this name."""
    encode = _tokenizer(name)
    return masked_batch(rows, encode, rng) if name == "toy-encoder" else causal_batch(rows, encode)


def heldout_losses(name: str, model: PreTrainedModel, rows: int = HELDOUT_ROWS) -> dict[str, float]:
    """Mean loss in nats per guessed byte for each kind of text, on text and masks that pre-training never drew."""
    losses = {}
    for kind in sorted(set(KINDS[name])):
        held_out = texts(kind, rows, split_seed("heldout"))
        losses[kind] = _loss(model, batch_of(name, kind, held_out, random.Random(split_seed("heldout"))))
    return losses


@torch.no_grad()
def _loss(model: PreTrainedModel, batch: Batch) -> float:
    was_training = model.training
    model.eval()
    loss = model(**batch).loss.item()
    model.train(was_training)
    return loss


def recorded(name: str) -> dict[str, Any]:
    """What `scripts/pretrain_toy.py` wrote beside the weights: losses, steps, seed, versions."""
    return json.loads((folder(name) / "pretraining.json").read_text(encoding="utf-8"))
