"""Exact match on GSM8K-style answers: generate greedily, compare the number after `####`."""

import re
from collections.abc import Sequence
from decimal import Context, Decimal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorakit.modules import evaluating

EXACT = Context(prec=1000)  # digits
Answered = Sequence[tuple[str, str]]  # prompt text up to the model's turn, reference answer with `#### N`
ANSWER = re.compile(r"####\s*(-?)\s*\$?\s*(-?[\d,]*\.?\d+)")


def gsm8k_answer(text: str) -> str | None:
    """The number after the first `####`, without commas, currency sign or trailing zeros; None where there is none."""
    if (found := ANSWER.search(text)) is None:
        return None
    number = Decimal((found[1] + found[2]).replace(",", "").replace("--", "-"))
    return f"{EXACT.plus(number).normalize(EXACT):f}"  # 18.00 is 18, 007 is 7, -0 is 0


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Answered, *, max_new_tokens: int, batch_size: int
) -> float:
    """Share of rows whose generated answer has the reference's number.

    Args:
        rows: of `Task.answers`; not none.
    """
    right = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        found = map(gsm8k_answer, generate(model, tokenizer, [prompt for prompt, _ in batch], max_new_tokens))
        right += sum(n is not None and n == gsm8k_answer(answer) for n, (_, answer) in zip(found, batch, strict=True))
    return right / len(rows)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of prompts of any lengths, one batch, padded on the left; each ends before <end_of_turn>."""
    encoded = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = {"input_ids": [start + ids for ids in encoded]}
    padded = tokenizer.pad(rows, padding_side="left", return_attention_mask=True, return_tensors="pt").to(model.device)
    ends = [end for end in (tokenizer.eos_token_id, tokenizer.vocab.get("<end_of_turn>")) if end is not None]
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True, "eos_token_id": ends or None}
    with evaluating(model):
        output = model.generate(**padded, pad_token_id=tokenizer.pad_token_id, **options)
    texts = tokenizer.batch_decode(output[:, padded["input_ids"].shape[1] :].cpu(), skip_special_tokens=False)
    for end in filter(None, ("<end_of_turn>", tokenizer.eos_token, tokenizer.pad_token)):
        texts = [text.split(end)[0] for text in texts]
    return texts
