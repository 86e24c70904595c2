"""The toy grammar's labels and answers, against readers of the text that share no code with it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from lorakit.tasks.toy.grammar import SPLITS, chats, reviews, split_seed, stories

COUNT = 1500

GOOD = {"good", "warm", "rich", "fresh", "clever", "superb", "moving", "gripping"}
GOOD |= {"loved", "liked", "enjoyed", "gem", "hit", "triumph"}
BAD = {"dull", "weak", "poor", "stale", "clumsy", "boring", "stupid", "annoying"}
BAD |= {"hated", "booed", "loathed", "dud", "sin", "failure"}
DEGREE = {"slightly": 1, "mildly": 1, "somewhat": 1, "utterly": 3, "truly": 3, "deeply": 3}


def opinion(text: str) -> int:
    """Value of one statement: read backwards from its opinion word."""
    *_, before, word = text.replace(" it", "").split()
    assert word in GOOD | BAD, text
    sign = 1 if word in GOOD else -1
    return -2 * sign if before in ("not", "never", "hardly", "no") else sign * DEGREE.get(before, 2)


def judge(sentence: str) -> int:
    """Value of one sentence by the contrast it makes."""
    if " but " in sentence:
        return opinion(sentence.split(" but ")[1])
    if sentence.startswith("although "):
        return opinion(sentence.split(", ")[1])
    if ", even though " in sentence:
        return opinion(sentence.split(", ")[0])
    return sum(opinion(part) for part in sentence.split(" and "))


@pytest.mark.parametrize("write", [reviews, stories, chats])
def test_same_seed_writes_the_same_and_a_larger_count_extends(write):
    assert write(40, 3) == write(40, 3)
    assert write(41, 3)[:33] == write(33, 3)
    assert write(40, 3) != write(40, 4)
    assert write(0, 3) == []


def test_another_process_with_another_hash_seed_writes_the_same():
    code = "from lorakit.tasks.toy.grammar import *; print(reviews(9, 5), stories(9, 5), chats(9, 5))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1
    assert str(reviews(9, 5)) in told.pop()


def test_first_rows_stay_what_the_weights_were_trained_on():
    assert reviews(2, 0) == GOLDEN_REVIEWS
    assert stories(1, 0) == GOLDEN_STORIES


def test_labels_agree_with_an_independent_reading():
    for text, label in reviews(COUNT, 11):
        values = [judge(sentence) for sentence in text.rstrip(".").split(". ")]
        assert all((value > 0) == (label == 1) and value != 0 for value in values), (text, values, label)


def test_reviews_are_balanced_short_and_rarely_repeated():
    rows = reviews(COUNT, 12)
    assert sum(label for _, label in rows) == COUNT // 2
    assert max(len(text.encode()) for text, _ in rows) <= 93
    assert len({text for text, _ in rows}) > 0.95 * COUNT


def test_every_rule_of_composition_is_used_on_both_labels():
    patterns = (r" (not|never|hardly|no) ", r" but ", r"^although|\. although", r"even though", r" and ",
                r" (slightly|mildly|somewhat) ", r" (utterly|truly|deeply) ")  # fmt: skip
    rows = reviews(COUNT, 13)
    for pattern in patterns:
        labels = Counter(label for text, label in rows if re.search(pattern, text))
        assert min(labels[0], labels[1]) > 0.04 * COUNT, (pattern, labels)


def test_intensity_decides_some_reviews():
    """Reading all adverbs of degree as one would get some "and" sentences wrong, so intensity carries meaning."""
    ignoring = [re.sub(rf"\b({'|'.join(DEGREE)}) ", "", text) for text, _ in reviews(COUNT, 14)]
    tied = [text for text in ignoring if any(judge(sentence) == 0 for sentence in text.rstrip(".").split(". "))]
    assert len(tied) > 0.03 * COUNT


def test_a_bag_of_words_stays_far_below_the_grammar():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(token_pattern=r"\w+")
    train, test = reviews(3000, split_seed("train")), reviews(1000, split_seed("test"))
    fitted = LogisticRegression(max_iter=500).fit(words.fit_transform([t for t, _ in train]), [y for _, y in train])
    accuracy = fitted.score(words.transform([t for t, _ in test]), [y for _, y in test])
    assert 0.5 < accuracy < 0.75


def test_stories_end_with_what_follows_from_them():
    for text in stories(COUNT, 15):
        sentences = text.rstrip(".").split(". ")
        assert 3 <= len(sentences) <= 6
        treasure = re.search(r"found a (\w+ \w+) in the (\w+)", sentences[0])
        moves = re.findall(r"took it to the (\w+)", text)
        gifts = re.findall(r"gave the \w+ \w+ to (\w+)", text)
        holder = gifts[-1] if gifts else sentences[0].split()[0]
        place = moves[-1] if moves else treasure[2]
        assert sentences[-1] == f"Now {holder} has the {treasure[1]} in the {place}"


def answer(question: str) -> str:
    """The right answer, worked out from the question alone."""
    if question.startswith("Repeat: "):
        return question.removeprefix("Repeat: ")
    if question.startswith("Spell backwards: "):
        return "".join(reversed(question.split()[-1]))
    if question.startswith("Count the words: "):
        return str(question.split(": ")[1].count(" ") + 1)
    if question.startswith("What is the opposite of "):
        return OPPOSITES[question.rstrip("?").split()[-1]]
    a, b, *c = map(int, re.findall(r"\d+", question))
    return str(a * b if "boxes" in question else a + b - sum(c))


def test_answers_are_right():
    asked = Counter()
    for chat in chats(COUNT, 16):
        assert [message["role"] for message in chat] == ["user", "assistant"] * (len(chat) // 2)
        for question, reply in zip(chat[::2], chat[1::2], strict=True):
            asked[question["content"].split()[0]] += 1
            final = reply["content"].split("#### ")[-1]
            assert final == answer(question["content"]), (question, reply)
            for left, right in re.findall(r"^(\d+ [-+*] \d+) = (\d+)$", reply["content"], re.MULTILINE):
                assert eval(left) == int(right)
    assert len(asked) > 10 and {"Repeat:", "Spell", "Count", "What"} <= set(asked)
    assert any(len(chat) == 4 for chat in chats(50, 16))


def test_splits_have_seeds_of_their_own():
    seeds = [split_seed(split, seed) for split in SPLITS for seed in range(20)]
    assert len(set(seeds)) == len(seeds)


GOLDEN_REVIEWS = [
    ("the humor is clumsy but the acting is truly clever.", 1),
    ("although the acting is truly warm, the humor is clumsy. it is a sin.", 0),
]
GOLDEN_STORIES = [
    "Ivy and Hugo found a red coin in the school. Ivy kept the red coin. Ivy gave the red coin to Hugo. "
    "Hugo gave the red coin to Ivy. Ivy gave the red coin to Hugo. Now Hugo has the red coin in the school."
]
PAIRS = "hot cold big small fast slow up down old new wet dry open closed early late full empty light dark hard soft"
PAIRS = f"{PAIRS} left right".split()
OPPOSITES = dict(zip(PAIRS[::2], PAIRS[1::2], strict=True)) | dict(zip(PAIRS[1::2], PAIRS[::2], strict=True))
