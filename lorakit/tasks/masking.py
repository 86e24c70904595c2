"""Masked language modelling: 15 % of the tokens are to be predicted; of these 80 % are hidden, 10 % random, 10 % kept.

Devlin et al. 2019. The draw depends on (seed, token ids) and on nothing else, so a resumed run masks as one that was
never interrupted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorakit.tasks.collate import IGNORED, PadCollator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBABILITY, HIDDEN, RANDOM = 0.15, 0.8, 0.1
EVALUATION_SEED = 0  # the same masks for every run, method and seed


@dataclass(frozen=True)
class Masker:
    """Hides tokens of a batch.

    Attributes:
        mask_id: the mask token.
        vocabulary: number of ids a random token is drawn from.
        special_ids: never chosen (padding among them).
        seed: of the draw, together with the ids.
    """

    mask_id: int
    vocabulary: int
    special_ids: tuple[int, ...]
    seed: int

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T) -> (ids with tokens hidden, labels); a row with any ordinary token has at least one label."""
        generator = self._generator(ids)
        chance = torch.rand(ids.shape, generator=generator)
        ordinary = ~torch.isin(ids, torch.tensor(self.special_ids))
        chance = chance.masked_fill(~ordinary, 2.0)
        least = chance == chance.amin(1, keepdim=True)
        chosen = ordinary & ((chance < PROBABILITY) | (least & ~(chance < PROBABILITY).any(1, keepdim=True)))
        return self._replaced(ids, chosen, generator), ids.masked_fill(~chosen, IGNORED)

    def _replaced(self, ids: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        action = torch.rand(ids.shape, generator=generator)
        others = torch.randint(self.vocabulary, ids.shape, generator=generator)
        hidden = ids.masked_fill(chosen & (action < HIDDEN), self.mask_id)
        return torch.where(chosen & (action >= HIDDEN) & (action < HIDDEN + RANDOM), others, hidden)

    def _generator(self, ids: torch.Tensor) -> torch.Generator:
        digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8, key=str(self.seed).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def masker(tokenizer: PreTrainedTokenizerFast, seed: int) -> Masker:
    special = tuple(sorted({*tokenizer.all_special_ids, tokenizer.pad_token_id}))
    return Masker(tokenizer.mask_token_id, len(tokenizer), special, seed)


@dataclass(frozen=True)
class MaskCollator:
    """Pads, then masks: the labels of a batch are a function of its ids and the seed."""

    pad: PadCollator
    masker: Masker

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.pad(rows)
        batch["input_ids"], batch["labels"] = self.masker(batch["input_ids"])
        return batch


def fixed(rows: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> tuple[list[list[int]], list[list[int]]]:
    """Evaluation ids and labels, masked row by row once and for all."""
    mask = masker(tokenizer, EVALUATION_SEED)
    masked = [mask(torch.tensor([ids])) for ids in rows]
    return [ids[0].tolist() for ids, _ in masked], [labels[0].tolist() for _, labels in masked]
