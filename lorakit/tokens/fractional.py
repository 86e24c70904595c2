"""Backpropagate through a fraction of the tokens: record every key and value, then run the chosen tokens alone.

Pass 1 has no graph: it records keys and values of all tokens and scores the predictions. Pass 2 runs the chosen tokens
with their own positions; they attend to recorded keys and values, at chosen positions to fresh ones. Gradients do not
flow through tokens that were not chosen (TokenTune, Simoulin et al. 2023).
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate

from lorakit.adapters.layer import AdapterLayer
from lorakit.errors import LorakitError, require
from lorakit.head import ambient_autocast, has_virtual_tokens
from lorakit.modules import blocks, random_state
from lorakit.seams import Inputs, Look, Selected
from lorakit.settings import Gating
from lorakit.tokens.choice import Chosen, Plan
from lorakit.tokens.positions import Cut, Masks, Places, chosen_inputs, chosen_masks, places
from lorakit.tokens.selection import TokenGate

ATTENTION = ("sdpa", "eager")
LAYERS = {"full_attention", "sliding_attention"}
OF_HEADS = "summary|classif|seq_classif|qa"  # how rates are called that belong to heads other than a language model's
SAME = 1e-3  # of the states: what is off by less has the same positions
TOLERANCE = 0.03  # of the losses, root mean square; both passes in bfloat16 are off by 0.01


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

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions are given


class FractionalGate(TokenGate):
    """A token selection that runs the layers' backward for the chosen tokens only.

    The gradient is that of the chosen predictions' loss along paths that touch chosen tokens only: exact where every
    token that is attended to is chosen, truncated else.

    Raises:
        LorakitError: a model it cannot serve: no decoder, or layers, attention or checkpointing it does not know.
    """

    two_pass = True

    def __init__(self, settings: Gating, model: nn.Module, kind: str, **options: Any):
        super().__init__(settings, model, kind, **options)
        require(kind == "causal", "gating.mode", "fractional", "needs a causal language model; encoders: 'gather'")
        self.blocks = blocks(model)
        self.config = model.config.get_text_config()
        self.dtype = model.get_input_embeddings().weight.dtype
        check_model(model)
        self._same = not drops_out(model)
        self._by_mask = False  # whether positions count the tokens that the mask lets in, as OPT's; -1 of padding

    def select(self, model: Callable[..., Any], inputs: Inputs, labels: Tensor, look: Look | None = None) -> Selected:
        chosen, *recorded = self._record(model, inputs, labels, look)
        if not len(chosen.where):
            return self._selected(chosen, lambda: torch.zeros((), device=labels.device, requires_grad=True), 0)
        at = self._dry.places if self._dry is not None else places(chosen.where, labels.shape[1])
        finish = lambda: self._loss_of(chosen, lambda: self._run(model, inputs, at, *recorded))  # noqa: E731
        ran = at.columns.numel()
        return self._selected(chosen, finish, len(chosen.where), (ran, ran * labels.shape[1]))

    def _record(
        self, model: Callable[..., Any], inputs: Inputs, labels: Tensor, look: Look | None
    ) -> tuple[Chosen, DynamicCache, Masks, Cut]:
        """Pass 1: what was chosen, keys and values of every layer, the masks of all tokens, and where pass 2 starts."""
        require("input_ids" in inputs, "inputs_embeds", "given", "mode 'fractional' needs input_ids; use 'gather'")
        require("past_key_values" not in inputs, "past_key_values", "given", "must be left to mode 'fractional'")
        masks = self._dry.masks if self._dry is not None else attention_masks(self.config, inputs, self.dtype)
        recorded, cut = DynamicCache(), Cut(self.model, self.blocks)
        packed = {} if "attention_mask" in inputs else {"attention_mask": masks}  # a cache hides where documents end
        given = {**inputs, **packed, "past_key_values": recorded, "use_cache": True}
        before = None if self._dry is not None else random_state(labels)
        with torch.no_grad(), self._scoring(model, inputs, labels), cut.recorded():
            chosen = self.head.reached(model, given, lambda hidden: self.choose(hidden, labels, look))
        if before is not None and not torch.equal(before, random_state(labels)):  # the second pass will be another one
            chosen.held = None
        if len(recorded.layers) != self.config.num_hidden_layers:
            told = f"{len(recorded.layers)} of its {self.config.num_hidden_layers} layers left their keys (use_cache)"
            raise refusal(model, told)
        for layer in recorded.layers[: cut.count]:  # not needed any more
            layer.keys = layer.values = None
        return chosen, recorded, masks, cut

    def _plan(self, inputs: Inputs, labels: Tensor) -> Plan:
        plan = super()._plan(inputs, labels)
        plan.masks = attention_masks(self.config, inputs, self.dtype)
        plan.places = places(plan.chosen.where, labels.shape[1]) if len(plan.chosen.where) else None
        return plan

    def _run(
        self, model: Callable[..., Any], inputs: Inputs, at: Places, recorded: DynamicCache, masks: Masks, cut: Cut
    ) -> tuple[Tensor, torch.autocast]:
        """Pass 2: what the head would be given (k, H), in the order of `Chosen.where`, and under which autocast."""
        given = {"attention_mask": chosen_masks(masks, at), "use_cache": True}
        given["past_key_values"] = FreshKeys(recorded, at)
        if self._by_mask and (mask := inputs.get("attention_mask")) is not None:
            inputs = {"position_ids": (mask.cumsum(1) * mask - 1).long(), **inputs}

        def take(hidden: Tensor) -> tuple[Tensor, torch.autocast]:
            return hidden[at.row, at.slot], ambient_autocast(hidden.device)

        with cut.started(at):
            return self.head.reached(model, chosen_inputs(inputs, at) | given, take)

    def _try(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> None:
        """Both passes must give the chosen predictions the same losses."""
        super()._try(model, inputs, labels)
        if not self.divisor(labels):
            return
        try:
            self._find_positions(model, inputs)
            chosen, *recorded = self._record(model, inputs, labels, None)
            states, _ = self._run(model, inputs, places(chosen.where, labels.shape[1]), *recorded)
        except LorakitError:
            raise
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            why = f"it fails on recorded keys or prepared masks ({type(error).__name__}: {error})"
            raise refusal(model, why) from error
        whole = self.head.reached(model, inputs, lambda hidden: hidden.flatten(0, 1)[chosen.where])
        first, again = (self.loss.nll(given, chosen.targets) for given in (whole, states))
        error = (again - first).norm() / first.norm()
        if not error < TOLERANCE and bool(torch.isfinite(first).all()):
            off = f"the chosen tokens alone have other losses than in their sequence (off by {error:.0%})"
            raise refusal(model, off)
        self.shares.draws -= 1

    def _find_positions(self, model: nn.Module, inputs: Inputs) -> None:
        """Are those that the model gives the tokens of a row padded on the left their columns?"""
        mask = inputs.get("attention_mask")
        if mask is None or mask.dim() != 2 or "position_ids" in inputs:
            return
        mask = nn.functional.pad(mask[:, 1:], (1, 0))
        columns = {"position_ids": torch.arange(mask.shape[1], device=mask.device)[None]}
        given, take = {**inputs, "attention_mask": mask}, lambda hidden: hidden[mask.bool()]
        own, told = (self.head.reached(model, given | more, take) for more in ({}, columns))
        self._by_mask = bool((told - own).norm() > SAME * own.norm())


def refusal(model: nn.Module, why: str) -> LorakitError:
    """What to raise of a model that turns out not to go with two passes."""
    return LorakitError(f"{type(model).__name__}: mode 'fractional' cannot serve this model: {why}; use 'gather'")


def check_model(model: nn.Module) -> None:
    """Refuse, by name, what `FractionalGate` cannot serve.

    Raises:
        LorakitError: see there.
    """
    config = model.config.get_text_config()
    name = f"{type(getattr(model, 'get_base_model', lambda: model)()).__name__}: mode 'fractional'"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "use_bidirectional_attention", False):
        raise LorakitError(f"{name} needs a causal decoder; use 'gather'")
    recurrent = getattr(type(model), "_is_stateful", False)  # state-space models keep no keys
    layers = set(getattr(config, "layer_types", None) or {"full_attention"})
    if not layers <= LAYERS or not hasattr(config, "num_attention_heads") or recurrent:
        raise LorakitError(f"{name} knows {' and '.join(sorted(LAYERS))}, not {sorted(layers)}; use 'gather'")
    if (attention := config._attn_implementation) not in ATTENTION:
        raise LorakitError(f"{name} needs attention 'sdpa' or 'eager', not {attention!r}; set `attention`")
    if has_virtual_tokens(model):
        raise LorakitError(f"{name} does not go with prompt learning, whose virtual tokens have no place of their own")
    if getattr(model, "is_activation_checkpointing", False):
        why = "which drops recorded keys (its activations are few: the chosen tokens'); use 'gather' or leave it out"
        raise LorakitError(f"{name} does not go with gradient_checkpointing, {why}")


@torch.no_grad()
def attention_masks(config: Any, inputs: Inputs, dtype: torch.dtype) -> Masks:
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
        and_mask_function=lambda *_: ids.new_ones((), dtype=torch.bool),  # "causal" is not spelt out else
    )


def drops_out(model: nn.Module) -> bool:
    """Whether its configuration, or PEFT's, or a layer has a rate of dropout or noise: both passes are never the same.

    Only what can be said beforehand; what a pass does draw is noticed when it runs.
    """
    configs = [model.config.get_text_config(), *getattr(model, "peft_config", {}).values()]
    named = [item for config in configs for item in config.to_dict().items() if re.search("drop|jitter|noise", item[0])]
    rates = [rate for name, rate in named if not re.match(OF_HEADS, name)]
    rates += [module.p for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    rates += [module.settings.dropout for module in model.modules() if isinstance(module, AdapterLayer)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
