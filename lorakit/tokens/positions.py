"""Chosen tokens as rows of their own, for a second pass: where each stands, what it may attend to, where it starts."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.modules import set_until

Masks = Tensor | dict[str, Tensor]


@dataclass
class Places:
    """Where the chosen tokens of (B, T) stand, as rows of equal length K for a second pass.

    sequences: (S,) that have one; of: (R,) which of these a row belongs to: one with many tokens has several rows.
    columns: (R, K) positions in the sequence, the last repeated as padding.
    row, slot: (k,) where in (R, K) each chosen token is; column: (k,) its position in the sequence.
    """

    sequences: Tensor
    of: Tensor
    columns: Tensor
    row: Tensor
    slot: Tensor
    column: Tensor

    @property
    def batch(self) -> Tensor:
        """(R,) which of the B sequences a row belongs to."""
        return self.sequences[self.of]


def places(where: Tensor, length: int) -> Places:
    """Lay out flat positions `where` (k,), ascending, of sequences of `length` tokens."""
    sequence, column = where // length, where % length
    sequences, owner, counts = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    width = row_width(counts.tolist(), length)
    needed = (counts + width - 1) // width  # rows of each sequence
    first, first_row = counts.cumsum(0) - counts, needed.cumsum(0) - needed
    rank = torch.arange(len(where), device=where.device) - first[owner]  # among its sequence's chosen ones
    row, slot = first_row[owner] + rank // width, rank % width
    of = torch.repeat_interleave(needed)
    before = (torch.arange(len(of), device=where.device) - first_row[of]) * width  # tokens in the sequence's other rows
    last = (counts[of] - before).clamp(max=width) - 1
    taken = torch.minimum(torch.arange(width, device=where.device), last[:, None])  # (R, K)
    return Places(sequences, of, column[(first[of] + before)[:, None] + taken], row, slot, column)


def row_width(counts: list[int], length: int) -> int:
    """K for sequences with so many chosen tokens each: the fewest tokens in all, padding included.

    A row costs its tokens, and a sixteenth of its sequence's `length` for keys and values of its own.
    """
    widths = {-(-max(counts) // parts) for parts in range(1, 9)} | set(counts)
    cost = {width: sum(-(-count // width) for count in counts) * (width + length / 16) for width in widths}
    return min(widths, key=lambda width: (cost[width], -width))


def chosen_masks(masks: Masks, at: Places) -> Masks:
    """Rows (R, 1, K, T) of the masks: what the chosen tokens attend to."""
    if isinstance(masks, dict):
        return {kind: chosen_masks(mask, at) for kind, mask in masks.items()}
    return masks[at.batch[:, None], :, at.columns].transpose(1, 2)


def chosen_inputs(inputs: Mapping[str, Any], at: Places) -> dict[str, Any]:
    """The chosen tokens' own ids, positions, …, (R, K) each."""
    shape = inputs["input_ids"].shape
    positions = torch.arange(shape[1], device=at.columns.device).expand(shape)
    known = {"position_ids": positions, **{n: v for n, v in inputs.items() if n != "attention_mask"}}
    by_token = {name: value for name, value in known.items() if torch.is_tensor(value) and value.dim() == 2}
    return known | {n: value.expand(shape)[at.batch[:, None], at.columns] for n, value in by_token.items()}


class Cut:
    """Where the first `count` of the `blocks` of `model` end, for one batch: nothing before that gets a gradient.

    An adapter that SkipLoRA lets rest does not learn.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        self.blocks = blocks
        probes = [probe for module in model.modules() if (probe := getattr(module, "probe", None)) is not None]
        resting = {id(parameter) for probe in probes if not probe.active for parameter in probe.parameters}
        learning = {id(p) for p in model.parameters() if p.requires_grad} - resting
        inside = [learning & {id(p) for p in block.parameters()} for block in self.blocks]
        head = {id(p) for p in model.get_output_embeddings().parameters()}
        first = {id(p) for p in model.get_input_embeddings().parameters()}
        outside = learning.difference(*inside, head - first)  # embeddings, a norm between the blocks, …
        self.count = 0 if outside else next((n for n, own in enumerate(inside) if own), len(self.blocks))
        self.states: Tensor | None = None  # (B, T, H) where the count-th block ends
        self.tuples = False  # whether blocks give tuples

    def recorded(self) -> contextlib.ExitStack:
        """While inside, a forward of all tokens leaves its states."""
        hooks = contextlib.ExitStack()
        for block in self.blocks[self.count - 1 : self.count]:
            hooks.enter_context(block.register_forward_hook(self._keep))
        return hooks

    def _keep(self, _: nn.Module, __: tuple, out: Any) -> None:
        self.tuples = not torch.is_tensor(out)
        self.states = out[0] if self.tuples else out

    def started(self, at: Places) -> contextlib.ExitStack:
        """While inside, a forward of the tokens `at` takes their states for what the first blocks give; only once."""
        stack = contextlib.ExitStack()
        if self.states is not None:
            chosen, self.states = self.states[at.batch[:, None], at.columns], None
            given = (chosen,) if self.tuples else chosen
            for block in self.blocks[: self.count]:
                set_until(stack, block, forward=lambda *_, **__: given)
        return stack
