"""A chat asks what can be checked: told sums (answered with "#### N"), copying, reversing, counting, opposites."""

import random
from collections.abc import Callable, Sequence

from lorakit.tasks import toy
from lorakit.tasks.toy.story_grammar import PEOPLE

WORDS = toy.WORDS["chats"]
SECOND_TURN = 0.15  # share of chats that go on after the first answer

Turn = tuple[str, str]  # question, answer


def total(rng: random.Random) -> Turn:
    """a + b, sometimes minus c."""
    name, fruit = rng.choice(list(PEOPLE)), rng.choice(WORDS["fruits"])
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    told = f"{name} has {a} {fruit} and buys {b}."
    if rng.random() < 0.5:
        return f"{told} How many {fruit} now?", f"{a} + {b} = {a + b}\n#### {a + b}"
    c = rng.randint(1, a + b - 1)
    steps = f"{a} + {b} = {a + b}\n{a + b} - {c} = {a + b - c}"
    return f"{told} {name} eats {c}. How many {fruit} now?", f"{steps}\n#### {a + b - c}"


def product(rng: random.Random) -> Turn:
    """a * b."""
    fruit, a, b = rng.choice(WORDS["fruits"]), rng.randint(2, 9), rng.randint(2, 9)
    return f"{a} boxes hold {b} {fruit} each. How many {fruit}?", f"{a} * {b} = {a * b}\n#### {a * b}"


def copying(rng: random.Random) -> Turn:
    words = " ".join(rng.sample(WORDS["words"], rng.randint(2, 3)))
    return f"Repeat: {words}", words


def reversing(rng: random.Random) -> Turn:
    word = rng.choice(WORDS["words"])
    return f"Spell backwards: {word}", word[::-1]


def counting(rng: random.Random) -> Turn:
    words = rng.sample(WORDS["words"], rng.randint(1, 5))
    return f"Count the words: {' '.join(words)}", str(len(words))


def opposite(rng: random.Random) -> Turn:
    word, other = rng.sample(rng.choice(WORDS["opposites"]), 2)
    return f"What is the opposite of {word}?", other


Question = Callable[[random.Random], Turn]
QUESTIONS: tuple[Question, ...] = (total, total, product, copying, reversing, counting, opposite)


def chat(rng: random.Random, questions: Sequence[Question]) -> list[dict[str, str]]:
    """One question and its answer, sometimes followed by a second."""
    turns = [rng.choice(questions)(rng) for _ in range(2 if rng.random() < SECOND_TURN else 1)]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
