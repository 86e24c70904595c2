"""A review's sentiment is composed: negation flips, intensity weighs, the main clause of a contrast wins.

    value(clause) = sign(word) * (-1 if negated) * (1 slightly | 2 | 3 utterly)
    A but B -> B      although A, B -> B      A, even though B -> A      A and B -> A + B
A verdict beside the sentence ("i never liked it.") always agrees with it. One word alone therefore says little.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from lorakit.tasks import toy

# of "good" and "bad", "liked" and "hated", "gems" and "flops" words have the same lengths: a masked one's says nothing
WORDS = toy.WORDS["reviews"]

NEGATED, WITH_VERDICT, VERDICT_FIRST = 0.25, 0.5, 0.3  # shares


class Clause(NamedTuple):
    """One statement about one aspect; `adverb` is a negator, an intensity or empty."""

    aspect: str
    adverb: str
    word: str

    @property
    def value(self) -> int:
        """Sentiment in -3..3, never 0."""
        sign = 1 if self.word in WORDS["good"] else -1
        if self.adverb in WORDS["negators"]:
            return -2 * sign
        return sign * (1 if self.adverb in WORDS["weakly"] else 3 if self.adverb in WORDS["strongly"] else 2)

    def __str__(self) -> str:
        return " ".join(filter(None, ("the", self.aspect, "is", self.adverb, self.word)))


def clause(rng: random.Random, sign: int, but_not: str = "") -> Clause:
    """A clause whose value has this sign (+1 or -1), about another aspect than `but_not`."""
    aspect = rng.choice([name for name in WORDS["aspects"] if name != but_not])
    if rng.random() < NEGATED:
        return Clause(aspect, rng.choice(WORDS["negators"]), rng.choice(WORDS["bad"] if sign > 0 else WORDS["good"]))
    adverb = rng.choice(("", "", rng.choice(WORDS["weakly"]), rng.choice(WORDS["strongly"])))
    return Clause(aspect, adverb, rng.choice(WORDS["good"] if sign > 0 else WORDS["bad"]))


def plain(rng: random.Random, sign: int) -> str:
    """One clause."""
    return f"{clause(rng, sign)}."


def contrast(rng: random.Random, sign: int) -> str:
    """Two clauses of opposite sign; the grammar of the sentence says which one is the point."""
    main = clause(rng, sign)
    side = clause(rng, -sign, but_not=main.aspect)
    return rng.choice((f"{side} but {main}.", f"although {side}, {main}.", f"{main}, even though {side}."))


def weighing(rng: random.Random, sign: int) -> str:
    """Two clauses joined by "and", in either order; their values add up."""
    heavy, light_sign = clause(rng, sign), rng.choice((sign, -sign))
    light = clause(rng, light_sign, but_not=heavy.aspect)
    while (heavy.value + light.value) * sign <= 0:
        heavy = clause(rng, sign)
        light = clause(rng, light_sign, but_not=heavy.aspect)
    first, second = rng.sample((heavy, light), 2)
    return f"{first} and {second}."


def verdict(rng: random.Random, sign: int) -> str:
    """What the reviewer felt, or what the film is; negated as often as a clause."""
    negated = rng.random() < NEGATED
    good = (sign > 0) != negated
    if rng.random() < 0.5:
        return f"i {'never ' if negated else ''}{rng.choice(WORDS['liked'] if good else WORDS['hated'])} it."
    return f"it is {'no' if negated else 'a'} {rng.choice(WORDS['gems'] if good else WORDS['flops'])}."


SENTENCES: tuple[Callable[[random.Random, int], str], ...] = (plain, plain, plain, contrast, contrast, weighing)


def review(rng: random.Random, label: int) -> tuple[str, int]:
    """One review with this label (1 positive, 0 negative), at most 93 bytes long."""
    sign = 1 if label else -1
    parts = [rng.choice(SENTENCES)(rng, sign)]
    if rng.random() < WITH_VERDICT:
        parts.insert(0 if rng.random() < VERDICT_FIRST else 1, verdict(rng, sign))
    return " ".join(parts), label


OPINION_WORDS = frozenset(w for kind in ("good", "bad", "liked", "hated", "gems", "flops") for w in WORDS[kind])
