"""Backpropagate through a fraction of the tokens: record every key and value, then run the chosen tokens alone.

Pass 1 has no graph: it records keys and values of all tokens and scores the predictions. Pass 2 runs the chosen tokens
with their own positions; they attend to recorded keys and values, at chosen positions to fresh ones. Gradients do not
flow through tokens that were not chosen (TokenTune, Simoulin et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate

from lorakit.errors import LorakitError, require
from lorakit.gates.tokens.chosen import Chosen, Plan
from lorakit.gates.tokens.protocol import Look, Selected
from lorakit.gates.tokens.selection import TokenGate
from lorakit.gating import Gating

ATTENTION = ("sdpa", "eager")
LAYERS = {"full_attention", "sliding_attention"}
TOLERANCE = 0.03  # of the losses, root mean square; both passes in bfloat16 are off by 0.01
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

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.columns.shape)


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

    def cost(width: int) -> float:
        return sum(-(-count // width) for count in counts) * (width + length / 16)

    longest = max(counts)
    return min({-(-longest // parts) for parts in range(1, 9)} | set(counts), key=lambda width: (cost(width), -width))


class FreshKeys(Cache):
    """Gives a layer the recorded keys and values of its sequences, those of the chosen tokens replaced by fresh ones.

    A layer's record is given up, in `recorded` as well, as soon as it is used: its memory is then the graph's.
    """

    def __init__(self, recorded: DynamicCache, chosen: Places):
        super().__init__(layers=[])
        self.chosen, self.recorded = chosen, recorded

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """keys, values: (R, heads, K, d), fresh; returns (R, heads, T, d) of both."""
        layer = self.recorded.layers[layer_idx]
        keys, layer.keys = self._replaced(layer.keys, keys), None
        values, layer.values = self._replaced(layer.values, values), None
        return keys, values

    def _replaced(self, recorded: Tensor, fresh: Tensor) -> Tensor:
        at = self.chosen
        old = recorded if len(at.sequences) == len(recorded) else recorded[at.sequences]
        new = fresh.transpose(1, 2)[at.row, at.slot].to(old.dtype)  # (k, heads, d)
        whole = old.transpose(1, 2).index_put((at.of[at.row], at.column), new).transpose(1, 2)  # (S, heads, T, d)
        return whole if len(at.of) == len(at.sequences) else whole.index_select(0, at.of)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given


class FractionalGate(TokenGate):
    """A token selection that runs the layers' backward for the chosen tokens only.

    The gradient is that of the chosen predictions' loss along paths that touch chosen tokens only: exact where every
    token that is attended to is chosen, truncated else.

    Raises:
        LorakitError: a model it cannot serve: no decoder, or layers, attention or checkpointing it does not know.
    """

    two_pass = True

    def __init__(self, settings: Gating, model: nn.Module, kind: str, *, seed: int = 0, rank: int = 0):
        super().__init__(settings, model, kind, seed=seed, rank=rank)
        require(kind == "causal", "gating.mode", "fractional", "needs a causal language model; encoders: 'gather'")
        self.config = model.config.get_text_config()
        self.dtype = model.get_input_embeddings().weight.dtype
        check_model(model)

    def select(
        self, model: Callable[..., Any], inputs: Mapping[str, Any], labels: Tensor, look: Look | None = None
    ) -> Selected:
        chosen, recorded, masks = self._record(model, inputs, labels, look)
        if not len(chosen.where):
            zero = next(iter(self.head.module.parameters())).new_zeros((), dtype=torch.float32)
            return self._selected(chosen, lambda: zero.clone().requires_grad_(), 0, ())
        at = self._dry.places if self._dry is not None else places(chosen.where, labels.shape[1])
        finish = lambda: chosen.total(self._run(model, inputs, chosen, at, recorded, masks))  # noqa: E731
        return self._selected(chosen, finish, len(chosen.where), at.shape)

    def _record(
        self, model: Callable[..., Any], inputs: Mapping[str, Any], labels: Tensor, look: Look | None
    ) -> tuple[Chosen, DynamicCache, Masks]:
        """Pass 1: what was chosen, keys and values of every layer, and the masks of all tokens."""
        require("past_key_values" not in inputs, "past_key_values", "given", "must be left to mode 'fractional'")
        masks = self._dry.masks if self._dry is not None else attention_masks(self.config, inputs, self.dtype)
        recorded, kept = DynamicCache(), []
        packed = {} if "attention_mask" in inputs else {"attention_mask": masks}  # a cache hides where documents end

        def replace(hidden: Tensor) -> Tensor:
            kept.append(self.choose(hidden, labels, look))
            return hidden[:, :0]

        with torch.no_grad(), self._head_input(replace):
            model(**{**inputs, **packed, "past_key_values": recorded, "use_cache": True})
        if len(recorded.layers) != self.config.num_hidden_layers:
            raise LorakitError(
                f"{type(model).__name__} recorded keys of {len(recorded.layers)} of its "
                f"{self.config.num_hidden_layers} layers: mode 'fractional' cannot serve it (use_cache); use 'gather'"
            )
        return kept[0], recorded, masks

    def _plan(self, inputs: Mapping[str, Any], labels: Tensor) -> Plan:
        plan = super()._plan(inputs, labels)
        plan.masks = attention_masks(self.config, inputs, self.dtype)
        plan.places = places(plan.chosen.where, labels.shape[1]) if len(plan.chosen.where) else None
        return plan

    def _run(
        self,
        model: Callable[..., Any],
        inputs: Mapping[str, Any],
        chosen: Chosen,
        at: Places,
        recorded: DynamicCache,
        masks: Masks,
    ) -> Tensor:
        """Pass 2: losses (k,) of the chosen, in the order of `chosen.where`."""
        flat = at.row * at.columns.shape[1] + at.slot
        with self._head_input(lambda hidden: hidden.flatten(0, 1)[flat][None]):
            outputs = model(
                **chosen_inputs(inputs, at),
                attention_mask=chosen_masks(masks, at),
                past_key_values=FreshKeys(recorded, at),
                use_cache=True,
            )
        return self.losses(outputs.logits, chosen.targets)

    def _try(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> None:
        """Both passes must give the chosen predictions the same losses."""
        super()._try(model, inputs, labels)
        if not self.divisor(labels):
            return
        try:
            chosen, recorded, masks = self._record(model, inputs, labels, None)
            second = self._run(model, inputs, chosen, places(chosen.where, labels.shape[1]), recorded, masks)
        except LorakitError:
            raise
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            raise LorakitError(
                f"{type(model).__name__}: mode 'fractional' cannot serve this model, it fails on recorded keys or "
                f"prepared masks ({type(error).__name__}: {error}); use 'gather'"
            ) from error
        hidden: list[Tensor] = []
        with self._head_input(lambda given: hidden.append(given) or given[:, :0]):
            model(**inputs)
        first = self.losses(self.head.logits(hidden[0].flatten(0, 1)[chosen.where]), chosen.targets)
        error = (second - first).norm() / first.norm()
        if not error < TOLERANCE and bool(torch.isfinite(first).all()):
            raise LorakitError(
                f"{type(model).__name__}: the chosen tokens alone have other losses than in their sequence (off by "
                f"{error:.0%}): mode 'fractional' cannot serve this model; use 'gather'"
            )
        self.draws -= 1

    def signature(self, labels: Tensor) -> Hashable:
        return (self.settings.mode, len(self._predictions(labels)[0]))


def check_model(model: nn.Module) -> None:
    """Refuse, by name, what `FractionalGate` cannot serve.

    Raises:
        LorakitError: see there.
    """
    config = model.config.get_text_config()
    name = f"{type(getattr(model, 'get_base_model', lambda: model)()).__name__}: mode 'fractional'"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "use_bidirectional_attention", False):
        raise LorakitError(f"{name} needs a causal decoder; use 'gather'")
    layers = set(getattr(config, "layer_types", None) or {"full_attention"})
    if not layers <= LAYERS or not hasattr(config, "num_attention_heads") or _recurrent(model):
        raise LorakitError(f"{name} knows {' and '.join(sorted(LAYERS))}, not {sorted(layers)}; use 'gather'")
    if config._attn_implementation not in ATTENTION:
        raise LorakitError(
            f"{name} needs attention 'sdpa' or 'eager', not {config._attn_implementation!r}; set `attention`"
        )
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
        raise LorakitError(f"{name} does not go with prompt learning, whose virtual tokens have no place of their own")
    if getattr(model, "is_activation_checkpointing", False):
        raise LorakitError(
            f"{name} does not go with gradient_checkpointing, which drops the recorded keys (its activations are "
            "those of the chosen tokens only); use 'gather' or leave checkpointing out"
        )


def _recurrent(model: nn.Module) -> bool:
    """State-space models keep no keys."""
    return bool(getattr(type(model), "_is_stateful", False))


@torch.no_grad()
def attention_masks(config: Any, inputs: Mapping[str, Any], dtype: torch.dtype) -> Masks:
    """What each kind of layer may attend to, (B, 1, T, T), as transformers makes it: causal, windows, padding, packing.

    Boolean for "sdpa", additive for "eager"; by layer type where the model has several.
    """
    ids = inputs["input_ids"]
    return create_masks_for_generate(
        config,
        inputs_embeds=ids.new_zeros((*ids.shape, 1), dtype=dtype),  # looked at for its shape only
        attention_mask=inputs.get("attention_mask"),
        past_key_values=None,
        position_ids=inputs.get("position_ids"),
        and_mask_function=lambda *_: torch.ones(
            (), dtype=torch.bool, device=ids.device
        ),  # "causal" is not spelt out else
    )


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
    found = {}
    for name, value in known.items():
        if torch.is_tensor(value) and value.dim() == 2:
            value = value.expand(shape)[at.batch[:, None], at.columns]
        found[name] = value
    return found
