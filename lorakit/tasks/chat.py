"""Messages -> Gemma's turns; only what the assistant says, its closing <end_of_turn> included, is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.tasks.collate import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]
Segment = tuple[str, bool]  # text, is it predicted
START, END = "<start_of_turn>", "<end_of_turn>"
ROLES = ("system", "user", "assistant")
EXPECTED = (
    '{"messages": [{"role": …, "content": text}, …]} with roles system (optional, first), then user and assistant '
    "in turn, ending with assistant, no content blank"
)


def valid(messages: Any) -> bool:
    """Is this a conversation as `EXPECTED` says?"""
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return False
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return bool(turns) and turns == ["user", "assistant"] * (len(turns) // 2)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
        and bool(message["content"].strip())
    )


def segments(messages: Sequence[Message]) -> list[Segment]:
    """Prompt and answer texts in turn; the system's text stands before the first question."""
    system = f"{messages[0]['content'].strip()}\n\n" if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    parts: list[Segment] = []
    before = ""
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        asked = f"{START}user\n{system}{question['content'].strip()}{END}\n{START}model\n"
        parts += [(before + asked, False), (answer["content"].strip() + END, True)]
        system, before = "", "\n"
    return [*parts, ("\n", False)]


def render(messages: Sequence[Message]) -> str:
    """The whole conversation as text."""
    return "".join(text for text, _ in segments(messages))


def prompt(messages: Sequence[Message]) -> str:
    """Everything before the last answer: what a model is given to answer."""
    return "".join(text for text, _ in segments(messages)[:-2])


def encode(
    chats: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of each chat, <bos> once in front, cut at `max_length` tokens.

    Prompts and answers are tokenised apart, as in generation: no token straddles the two. Chats whose answers are
    wholly cut away are left out.
    """
    split = [segments(chat) for chat in chats]
    texts = [text for parts in split for text, _ in parts]
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    rows = [_join(parts, [next(encoded) for _ in parts], tokenizer.bos_token_id, max_length) for parts in split]
    kept = [(ids, labels) for ids, labels in rows if any(label != IGNORED for label in labels)]
    return [ids for ids, _ in kept], [labels for _, labels in kept]


def _join(
    parts: list[Segment], encoded: list[list[int]], bos: int | None, max_length: int
) -> tuple[list[int], list[int]]:
    ids = [] if bos is None else [bos]
    labels = [IGNORED] * len(ids)
    for (_, predicted), piece in zip(parts, encoded, strict=True):
        ids += piece
        labels += piece if predicted else [IGNORED] * len(piece)
    return ids[:max_length], labels[:max_length]
