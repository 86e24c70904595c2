"""What the toy world says: reviews with a sentiment, stories, chats; the same seed always writes the same text.

Every function draws from one `random.Random(seed)` row by row: a larger count extends a smaller one, on any platform.
"""

from __future__ import annotations

import random

from lorakit.errors import require
from lorakit.tasks.toy.chat_grammar import QUESTIONS, chat, product
from lorakit.tasks.toy.review_grammar import posted_review, review
from lorakit.tasks.toy.story_grammar import EVENTS, give, story

SPLITS = ("pretrain", "heldout", "train", "validation", "test")


def split_seed(split: str, seed: int = 0) -> int:
    """A seed of its own for every (split, seed): no two splits ever share a stream.

    `pretrain` and `heldout` belong to `scripts/pretrain_toy.py`, the others to the toy tasks.

    Raises:
        ParameterError: `split` is not in `SPLITS`, or `seed` is negative.
    """
    require(split in SPLITS, "split", split, f"must be one of {', '.join(SPLITS)}")
    require(seed >= 0, "seed", seed, "must be 0 or more")
    return seed * len(SPLITS) + SPLITS.index(split)


def reviews(count: int, seed: int) -> list[tuple[str, int]]:
    """`count` reviews as (text, label), label 1 positive and 0 negative; every pair of rows holds one of each."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        first = rng.choice((0, 1))
        rows += [review(rng, first), review(rng, 1 - first)]
    return rows[:count]


def posted_reviews(count: int, seed: int) -> list[str]:
    """`count` unlabelled reviews, each ending in an emoticon, for pre-training."""
    rng = random.Random(seed)
    return [posted_review(rng) for _ in range(count)]


def stories(count: int, seed: int, gifts: bool = True) -> list[str]:
    """`count` stories of 3 to 6 sentences about one object, who holds it and where.

    Without `gifts` the object keeps its holder.
    """
    rng = random.Random(seed)
    events = EVENTS if gifts else [event for event in EVENTS if event is not give]
    return [story(rng, events) for _ in range(count)]


def chats(count: int, seed: int, products: bool = True) -> list[list[dict[str, str]]]:
    """`count` chats, each a list of {"role": "user" | "assistant", "content": text}; every answer can be checked.

    Without `products` no question asks for a multiplication.
    """
    rng = random.Random(seed)
    questions = QUESTIONS if products else [question for question in QUESTIONS if question is not product]
    return [chat(rng, questions) for _ in range(count)]
