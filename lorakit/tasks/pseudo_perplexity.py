"""Pseudo-perplexity: exp(-1/N sum_t log p(x_t | x without x_t)), each token hidden alone (Salazar et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lorakit.tasks.collate import IGNORED, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Probe = tuple[list[int], int, int]  # ids with one token hidden, its place, the token


@torch.no_grad()
def pseudo_perplexity(
    model: PreTrainedModel, rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, *, batch_size: int = 64
) -> float:
    """One forward pass per token: dear, and exact.

    Args:
        rows: of a masked task's split; tokens its evaluation masks hid are put back first.
        batch_size: hidden tokens at once.
    """
    training, total, count = model.training, 0.0, 0
    model.eval()
    for batch in _batches(_probes(rows, tokenizer), batch_size):
        total += _loss(model, batch, tokenizer.pad_token_id)
        count += len(batch)
    model.train(training)
    return math.exp(total / count)


def _probes(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> Iterator[Probe]:
    special = {*tokenizer.all_special_ids, tokenizer.pad_token_id}
    for row in rows:
        labels = row.get("labels") or [IGNORED] * len(row["input_ids"])
        ids = [token if label == IGNORED else label for token, label in zip(row["input_ids"], labels, strict=True)]
        for place, token in enumerate(ids):
            if token not in special:
                yield [*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]], place, token


def _batches(probes: Iterable[Probe], size: int) -> Iterator[list[Probe]]:
    batch: list[Probe] = []
    for probe in probes:
        batch.append(probe)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _loss(model: PreTrainedModel, batch: list[Probe], pad_id: int) -> float:
    ids = padded([ids for ids, _, _ in batch], pad_id).to(model.device)
    mask = padded([[1] * len(ids) for ids, _, _ in batch], 0).to(model.device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    chosen = logits[torch.arange(len(batch)), [place for _, place, _ in batch]].float()
    return float(F.cross_entropy(chosen.cpu(), torch.tensor([token for _, _, token in batch]), reduction="sum"))
