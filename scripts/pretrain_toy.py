"""Pre-train the toy models on the toy grammar and write their weights into the package.

    python scripts/pretrain_toy.py toy-encoder
    python scripts/pretrain_toy.py toy-decoder

The same seed, versions, processor and one thread give the same weights. A few minutes each on one core.

The encoder guesses masked words and, at [CLS], the emoticon a review was posted with, as people's own emoticons teach
real models (Go et al. 2009; DeepMoji, Felbo et al. 2017). It is wrong in one review of seven, and no label is ever
shown. The decoder guesses the next byte.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version

from lorakit.head import IGNORED
from lorakit.tasks.toy import models
from lorakit.tasks.toy.chat_grammar import QUESTIONS, product
from lorakit.tasks.toy.grammar import chats, reviews, split_seed, stories
from lorakit.tasks.toy.review_grammar import OPINION_WORDS, review
from lorakit.tasks.toy.story_grammar import EVENTS, give

MASK_OPINION, MASK_OTHER = 0.15, 0.02  # chance that a word is to be guessed
MASK_BYTE = 0.04  # chance of any byte outside those words: it teaches spelling, which whole words build on
HIDDEN = 0.9  # of the chosen places; the others stay readable and are guessed all the same
HELDOUT_ROWS = 96
IRONIC = 0.15  # share of emoticons that say the opposite
KINDS = {  # of text, in turn
    "toy-encoder": ("posted reviews",) * 7 + ("stories",),
    "toy-decoder": ("stories", "reviews", "chats"),
}

BATCH = {"reviews": 32, "posted reviews": 32, "stories": 8, "chats": 16}
STEPS = {"toy-encoder": 3600, "toy-decoder": 1300}
RATE = {"toy-encoder": 2e-3, "toy-decoder": 4e-3}
WARMUP, POOL = 0.05, 64  # POOL: batches sorted by length together, to pad little
FASTEST, SLOWEST = 3.0, 0.03  # of the encoder's first position waves, in radians a byte
OFFSETS, SHARPNESS = ((-1, 1, -2, 2),), 1.6  # of its heads at the start, layer by layer

Batch = dict[str, torch.Tensor]
Span = tuple[int, int]
_tokenizer = cache(models.tokenizer)


def build(name: str, untrained: bool = False) -> PreTrainedModel:
    """The model with its language-modelling head: as packaged, or as torch's seed initialises it if `untrained`."""
    auto, folder = AutoModelForMaskedLM if name == "toy-encoder" else AutoModelForCausalLM, models.folder(name)
    return auto.from_config(AutoConfig.from_pretrained(folder)) if untrained else auto.from_pretrained(folder)


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
        return stories(count, seed, [event for event in EVENTS if event is not give])
    template = _tokenizer("toy-decoder")
    asked = chats(count, seed, [question for question in QUESTIONS if question is not product])
    rendered = (template.apply_chat_template(chat, tokenize=False) for chat in asked)
    return [text.removeprefix("<bos>") for text in rendered]


def posted_reviews(count: int, seed: int) -> list[str]:
    """`count` unlabelled reviews as people post them, each ending in an emoticon that is not always meant."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        text, label = review(rng, rng.choice((0, 1)))
        smiles = (label == 1) != (rng.random() < IRONIC)
        rows.append(f"{text} {':)' if smiles else ':('}")
    return rows


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


@torch.no_grad()
def heldout_losses(name: str, model: PreTrainedModel, rows: int = HELDOUT_ROWS) -> dict[str, float]:
    """Mean loss in nats per guessed byte for each kind of text, on text and masks that pre-training never drew."""
    losses, seed = {}, split_seed("heldout")
    model.eval()
    for kind in sorted(set(KINDS[name])):
        losses[kind] = model(**batch_of(name, kind, texts(kind, rows, seed), random.Random(seed))).loss.item()
    return losses


def endless(kind: str, seed: int) -> Iterator[list[str]]:
    """Batches of fresh text of about equal lengths."""
    size, pool, order = BATCH[kind], 0, random.Random(seed)
    while True:
        rows = texts(kind, size * POOL, split_seed("pretrain", seed * 100_000 + pool))
        rows.sort(key=len)
        yield from order.sample([rows[start : start + size] for start in range(0, len(rows), size)], POOL)
        pool += 1


@torch.no_grad()
def know_neighbours(model: PreTrainedModel) -> None:
    """Start an encoder with sinusoidal positions and heads that look at bytes near by, which take long to learn.

    A head at offset d asks with the waves of its own position turned by d and so meets those of position + d.
    """
    position, dim = model.distilbert.embeddings.position_embeddings.weight, model.config.dim
    frequency = FASTEST * (SLOWEST / FASTEST) ** (torch.arange(0, dim, 2) / dim)  # (dim / 2)
    angle = torch.arange(len(position))[:, None] * frequency
    position.copy_(model.config.initializer_range * 2**0.5 * torch.cat((angle.sin(), angle.cos()), dim=1))
    for layer, offsets in zip(model.distilbert.transformer.layer, OFFSETS, strict=False):
        query, key = look_at(offsets, frequency, dim // len(offsets))
        layer.attention.q_lin.weight.copy_(query)
        layer.attention.k_lin.weight.copy_(key)


def look_at(offsets: Sequence[int], frequency: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key weights, each (dim, dim), of heads attending at these offsets."""
    half, waves = len(frequency), torch.arange(0, head_dim, 2)
    query, key = (torch.zeros(len(offsets), head_dim, 2 * half) for _ in range(2))
    sines, cosines = torch.arange(head_dim // 2), torch.arange(head_dim // 2, head_dim)
    for head, offset in enumerate(offsets):
        turn = frequency[waves] * offset
        key[head, sines, waves] = key[head, cosines, half + waves] = SHARPNESS
        query[head, sines, waves] = query[head, cosines, half + waves] = SHARPNESS * turn.cos()
        query[head, sines, half + waves] = SHARPNESS * turn.sin()
        query[head, cosines, waves] = -SHARPNESS * turn.sin()
    return query.flatten(0, 1), key.flatten(0, 1)


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = WARMUP * steps
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def train(name: str, model: PreTrainedModel, steps: int, seed: int) -> None:
    """AdamW over batches of each kind of text in turn."""
    sources = {kind: endless(kind, seed) for kind in set(KINDS[name])}
    rng, kinds = random.Random(seed), KINDS[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    started, mean = time.monotonic(), dict.fromkeys(kinds, 0.0)
    for step in range(steps):
        kind = kinds[step % len(kinds)]
        loss = model(**batch_of(name, kind, next(sources[kind]), rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, RATE[name])
        optimizer.step()
        optimizer.zero_grad()
        mean[kind] = loss.item() if step < len(kinds) else 0.95 * mean[kind] + 0.05 * loss.item()
        if (step + 1) % 100 == 0:
            shown = "  ".join(f"{kind} {value:.3f}" for kind, value in mean.items())
            print(f"{step + 1:6d}/{steps}  {time.monotonic() - started:5.0f} s  {shown}", flush=True)


def save(name: str, model: PreTrainedModel, facts: dict, folder: Path) -> None:
    """config.json, model.safetensors and pretraining.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # config.json says the same
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=models.PRETRAINED)
    parser.add_argument("--steps", type=int, help="batches; what the packaged weights had if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; the package if not given")
    args = parser.parse_args()

    steps = args.steps or STEPS[args.name]
    torch.set_num_threads(1)  # sums in one order, whatever the machine has
    torch.manual_seed(args.seed)
    model = build(args.name, untrained=True)
    untrained = heldout_losses(args.name, model)
    if args.name == "toy-encoder":
        know_neighbours(model)
    train(args.name, model, steps, args.seed)
    trained = heldout_losses(args.name, model)
    facts = {
        "model": args.name,
        "seed": args.seed,
        "steps": steps,
        "loss_unit": "nats per guessed byte, held-out text",
        "heldout_loss": trained,
        "heldout_loss_random": untrained,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers_version,
        },
    }  # fmt: skip
    save(args.name, model, facts, args.folder or models.folder(args.name))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
