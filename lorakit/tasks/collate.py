"""Rows to one batch: right-padded to a multiple of 8; several conversations a row (packing); tokens hidden (masking).

Packing: positions restart at each conversation, and none attends to or predicts another. Given `position_ids` and no
`attention_mask`, transformers derives a block-diagonal mask from the restarts (full and sliding layers, sdpa and
eager), as long as the model keeps no key-value cache: `config.use_cache = False`, as the Trainer sets it. Models with
positions or a state of their own (OPT, Bloom, Mamba) do not look at the restarts: `require_apart` finds them out.

Masking: 15 % of the tokens are to be predicted; of these 80 % are hidden, 10 % random, 10 % kept (Devlin et al. 2019).
The draw depends on (seed, token ids) and on nothing else, so a resumed run masks as one that was never interrupted.
"""

import contextlib
import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorakit.errors import ParameterError, require, retold
from lorakit.head import IGNORED
from lorakit.modules import evaluating, set_until

MULTIPLE = 8
PROBABILITY, HIDDEN, RANDOM = 0.15, 0.8, 0.1  # of masking
ROUNDING = 1e-4  # of logits, relative to their spread, between a document in a packed row and alone; float32
EVALUATION_SEED = 0  # the same masks for every run, method and seed

Columns = dict[str, list]


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(B, T) int64, T the longest row rounded up to a multiple of 8."""
    length = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


@dataclass(frozen=True)
class Masker:
    """Hides tokens of a batch.

    Attributes:
        tokenizer: its special tokens (padding among them) are never chosen; a random token is any of its ids.
        seed: of the draw, together with the ids.
    """

    tokenizer: PreTrainedTokenizerFast
    seed: int

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T) -> (ids with tokens hidden, labels); a row with any ordinary token has at least one label."""
        digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8, key=str(self.seed).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        chance = torch.rand(ids.shape, generator=generator)
        ordinary = ~torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        chance = chance.masked_fill(~ordinary, 2.0)
        chosen = ordinary & ((chance < PROBABILITY) | (chance == chance.amin(1, keepdim=True)))
        action = torch.rand(ids.shape, generator=generator)
        others = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
        hidden = ids.masked_fill(chosen & (action < HIDDEN), self.tokenizer.mask_token_id)
        hidden = torch.where(chosen & (action >= HIDDEN) & (action < HIDDEN + RANDOM), others, hidden)
        return hidden, ids.masked_fill(~chosen, IGNORED)


@dataclass(frozen=True)
class PadCollator:
    """Model inputs of rows with `input_ids`, `attention_mask`, perhaps `token_type_ids`, and perhaps `labels`.

    A row's label is a class, giving labels (B,), or token ids, giving labels (B, T) padded with -100.

    Attributes:
        masker: hides tokens of the padded batch: its labels are a function of its ids and the seed.
    """

    pad_id: int
    masker: Masker | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        values = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0}
        batch = {name: padded([row[name] for row in rows], value) for name, value in values.items() if name in rows[0]}
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            batch["labels"] = torch.tensor(labels) if isinstance(labels[0], int) else padded(labels, IGNORED)
        if self.masker:
            batch["input_ids"], batch["labels"] = self.masker(batch["input_ids"])
        return batch


def pack(ids: Sequence[list[int]], labels: Sequence[list[int]], max_length: int) -> Columns:
    """Rows of at most `max_length` tokens by best fit, the longest first; a conversation is never divided.

    The first token of a conversation, none of which is longer, has no label: it would be predicted from the one before.
    """
    columns: Columns = {"input_ids": [], "attention_mask": [], "labels": [], "position_ids": []}
    rooms: list[tuple[int, int]] = []  # (tokens left, row), in this order
    for tokens, targets in sorted(zip(ids, labels, strict=True), key=lambda pair: -len(pair[0])):
        if (best := bisect_left(rooms, (len(tokens),))) < len(rooms):
            room, row = rooms.pop(best)
        else:
            room, row = max_length, len(columns["input_ids"])
            for column in columns.values():
                column.append([])
        insort(rooms, (room - len(tokens), row))
        columns["input_ids"][row] += tokens
        columns["attention_mask"][row] += [1] * len(tokens)
        columns["labels"][row] += [IGNORED, *targets[1:]]
        columns["position_ids"][row] += range(len(tokens))
    return columns


class PackedCollator(PadCollator):
    """Pads packed rows; padding is one more document, so that no real token sees it. No `attention_mask`: see above."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        length = batch.pop("attention_mask").shape[1]
        positions = [[*row["position_ids"], *range(length - len(row["position_ids"]))] for row in rows]
        return batch | {"position_ids": torch.tensor(positions)}


@torch.no_grad()
def require_apart(model: PreTrainedModel, rows: Sequence[dict[str, Any]], collator: PackedCollator) -> None:
    """Of the first of the packed `rows` with two documents every document has the logits it has alone.

    The first document of a row sees no other: by how much it is off says what rounding does.

    Raises:
        ParameterError: it has not, or the model takes no positions.
    """
    if (row := next((row for row in rows if row["position_ids"].count(0) > 1), None)) is None:
        return
    batch, length = collator([row]), len(row["input_ids"])
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    lengths = [end - start for start, end in pairwise([*starts, length])]
    refused = retold(TypeError, ParameterError, "packing", True, f"{type(model).__name__} takes no packed rows")
    with refused, contextlib.ExitStack() as stack, evaluating(model):
        set_until(stack, model.config, use_cache=False)
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0, :length]
        alone = [model(input_ids=ids).logits[0] for ids in batch["input_ids"][:, :length].split(lengths, dim=1)]
    pairs = [(found.float(), own.float()) for found, own in zip(packed.split(lengths), alone, strict=True)]
    first, *others = [((found - own).norm() / own.std().clamp(min=1e-12) / own.numel() ** 0.5) for found, own in pairs]
    off = max((found - own).abs().max() for found, own in pairs)
    allowed = f"{type(model).__name__} lets the documents of a row see each other (logits off by {off:.2g}); use false"
    limit = max(4 * first.item(), ROUNDING, torch.finfo(model.dtype).eps)
    require(max(others).item() <= limit, "packing", True, allowed)


def masked_once(rows: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> tuple[list[list[int]], list[list[int]]]:
    """Evaluation ids and labels, masked row by row once and for all."""
    mask = Masker(tokenizer, EVALUATION_SEED)
    masked = [mask(torch.tensor([ids])) for ids in rows]
    return [ids[0].tolist() for ids, _ in masked], [labels[0].tolist() for _, labels in masked]
