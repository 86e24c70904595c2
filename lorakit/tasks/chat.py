"""Messages -> Gemma's turns; only what the assistant says, its closing <end_of_turn> included, is to be predicted."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from lorakit.head import IGNORED

Chat = Sequence[dict[str, str]]
Segment = tuple[str, bool]  # text, is it predicted
START, END = "<start_of_turn>", "<end_of_turn>"
EXPECTED = (
    '{"messages": [{"role": …, "content": text}, …]} with roles system (optional, first), then user and assistant '
    "in turn, ending with assistant, no content blank; or prompt and completion, or instruction, input and output"
)


def valid(messages: Any) -> bool:
    """Is this a conversation as `EXPECTED` says?"""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    contents = [message.get("content") for message in messages]
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = bool(turns) and turns == ["user", "assistant"] * (len(turns) // 2)
    return in_turn and all(isinstance(text, str) and text.strip() for text in contents)


def segments(messages: Chat) -> list[Segment]:
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


def prompt(messages: Chat) -> str:
    """Everything before the last answer: what a model is given to answer."""
    return "".join(text for text, _ in segments(messages)[:-2])


def encode(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of each chat, <bos> once in front, cut at `max_length` tokens.

    Prompts and answers are tokenised apart, as in generation: no token straddles the two. Chats whose answers are
    wholly cut away are left out.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    kept: tuple[list[list[int]], list[list[int]]] = ([], [])
    for parts in map(segments, chats):
        ids, labels = list(start), [IGNORED] * len(start)
        pieces = tokenizer([text for text, _ in parts], add_special_tokens=False, verbose=False)["input_ids"]
        for piece, (_, predicted) in zip(pieces, parts, strict=True):
            ids += piece
            labels += piece if predicted else [IGNORED] * len(piece)
        if any(label != IGNORED for label in labels[:max_length]):
            kept[0].append(ids[:max_length])
            kept[1].append(labels[:max_length])
    return kept
