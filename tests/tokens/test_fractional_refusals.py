"""Models and settings that the second pass cannot serve."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
import training_runs as runs
from decoders import adapted, batch, of, selection, split

from lorakit.errors import LorakitError, ParameterError
from lorakit.params import Params, check
from lorakit.settings import Gating
from lorakit.tokens import build_tokens, fractional
from lorakit.tokens.fractional import FreshKeys
from lorakit.tokens.head_loss import HeadLoss

# what it cannot serve -------------------------------------------------------------------------------


def test_encoders_are_refused():
    with pytest.raises(ParameterError, match=r"^gating.mode='fractional': needs a causal language model; .*'gather'"):
        build_tokens(Gating(method="flora", mode="fractional"), runs.tiny_masked(), "masked")


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4))


def prompted():
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(of("gemma"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def changed(name, **config):
    model = of(name)
    for key, value in config.items():
        setattr(model.config, key, value)
    return model


def linear_attention():
    return changed("llama", layer_types=["full_attention", "linear_attention"])


def checkpointing():
    model = of("gemma")
    model.activation_checkpointing_enable()
    return model


GEMMA, ATTENTION = "Gemma3ForCausalLM: .*", "needs attention 'sdpa' or 'eager', not "


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed("gemma", _attn_implementation="flash_attention_2"), GEMMA + ATTENTION + "'flash_attention_2'"),
        (lambda: changed("gemma", _attn_implementation="flex_attention"), GEMMA + ATTENTION + "'flex_attention'"),
        (mamba, "MambaForCausalLM: mode 'fractional'.*use 'gather'"),
        (linear_attention, "LlamaForCausalLM: .*not .*linear_attention.*use 'gather'"),
        (lambda: of("gemma", use_bidirectional_attention=True), "needs a causal decoder"),
        (checkpointing, "does not go with gradient_checkpointing"),
        (prompted, GEMMA + "does not go with prompt learning"),
    ],
)
def test_models_it_cannot_serve_are_refused(make, message):
    with pytest.raises(LorakitError, match=message):
        selection(make())


def test_checkpointing_switched_on_later_is_noticed():
    model, given = adapted(of("gemma")), batch("right")
    tokens = selection(model)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    with pytest.raises(LorakitError, match="mode 'fractional'"):
        tokens.select(model, *split(given)).finish()


def test_a_model_whose_code_fails_on_prepared_masks_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(LorakitError, match=r"BloomForCausalLM: .*cannot serve this model.*ValueError.*use 'gather'"):
        selection(model).verify(model, *split(batch("right")))


def test_keys_of_ones_own_are_refused():
    from transformers import DynamicCache

    model, given = adapted(of("gemma")), batch("right")
    inputs, labels = split(given)
    with pytest.raises(ParameterError, match="^past_key_values='given': must be left to mode 'fractional'"):
        selection(model).select(model, inputs | {"past_key_values": DynamicCache()}, labels)


def wrong_positions(inputs, at):
    right = chosen_inputs(inputs, at)
    return right | {"position_ids": torch.arange(at.columns.shape[1]).expand(at.columns.shape)}


chosen_inputs, chosen_masks = fractional.chosen_inputs, fractional.chosen_masks


def shifted(at):
    """Everyone sees as much as the first token of its row."""
    return replace(at, columns=at.columns[:, :1].expand(at.columns.shape))


@pytest.mark.parametrize("broken", ["positions", "masks", "keys"])
@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_a_model_whose_second_pass_has_other_losses_is_refused(monkeypatch, name, broken):
    model, given = adapted(of(name, initializer_range=0.5) if name == "gemma" else of(name)), batch("right")
    tokens = selection(model, topk_tokens=0.4)
    draws = tokens.shares.draws
    tokens.verify(model, *split(given))
    assert tokens.shares.draws == draws and model.training  # a trial leaves nothing behind
    if broken == "positions":
        monkeypatch.setattr(fractional, "chosen_inputs", wrong_positions)
    elif broken == "masks":
        monkeypatch.setattr(fractional, "chosen_masks", lambda masks, at: chosen_masks(masks, shifted(at)))
    else:
        monkeypatch.setattr(FreshKeys, "_replaced", lambda self, old, new: torch.zeros_like(old))
    with pytest.raises(LorakitError, match=f"{type(model).__name__}: .*: the chosen tokens alone have other losses"):
        tokens.verify(model, *split(given))


@pytest.mark.parametrize(
    ("factors", "refused"),
    [((1, 1.02), False), ((1, 1.05), True), ((1, float("nan")), True), ((float("nan"),) * 2, False)],
)
def test_the_losses_of_both_passes_may_differ_by_three_percent(monkeypatch, factors, refused):
    model, given = adapted(of("gemma")), batch("right")
    losses, scale = HeadLoss.losses, iter(factors)

    def off(self, *given):
        factor = next(scale)
        return [(factor * one, right) for one, right in losses(self, *given)]

    monkeypatch.setattr(HeadLoss, "losses", off)
    told = pytest.raises(LorakitError, match="other losses than in their sequence")
    with told if refused else contextlib.nullcontext():
        selection(model).verify(model, *split(given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "fp16"}, "^precision='fp16': fp16's gradient scaler"),
        ({"gradient_checkpointing": True}, "^gradient_checkpointing=True: .*'fractional'"),
        ({"skip": "adapter"}, "^gating.mode='fractional': measures no layers"),
    ],
)
def test_settings_that_contradict_the_run(given, message):
    with pytest.raises(ParameterError, match=message):
        check(Params(gating=Gating(method="flora", mode="fractional"), **given))
    check(Params(gating=Gating(), **given))
    if "precision" not in given:
        check(Params(gating=Gating(method="flora", mode="gather"), **given))
