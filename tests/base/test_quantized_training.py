"""Adapters on a 4-bit base: training, merging, PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from four_bit_models import assert_close, dense_twin, four_bit_layers, layer_of
from small_models import KINDS, assert_only_trained, backward, batch, bits, gradients, logits, perturb, same_bits, train
from torch import nn

from lorakit.adapters import (
    adapter_layers,
    attach,
    detach,
    load_adapter,
    merge,
    quantize_nf4,
    requantisation_error,
    save_adapter,
    unmerge,
)
from lorakit.base.nf4 import dequantise
from lorakit.errors import LorakitError

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("method", ["lora", "sparse", "hira"])
def test_outputs_and_gradients_equal_the_dense_twins(build, method, double_quant):
    for kind in KINDS:
        model = quantize_nf4(build(kind), double_quant=double_quant, compute_dtype="fp32")
        twin = attach(dense_twin(model), method, rank=4, seed=0)
        attach(model, method, rank=4, seed=0)
        assert_close(backward(perturb(model)), backward(perturb(twin)), 1e-5)
        mine, theirs = (torch.cat([grad.flatten() for grad in gradients(side).values()]) for side in (model, twin))
        assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_adapters_and_nothing_else(build, kind):
    model = attach(quantize_nf4(build(kind)), seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "classifier" in name for name in trained)
    before = bits(model)
    assert any(name.endswith("weight.absmax") for name in before)
    train(model, 3)
    assert_only_trained(model, before)


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_loss_falls_as_the_dense_models_does(build, double_quant):
    labels = torch.tensor([0, 1, 1, 0])
    losses = {}
    for side in ("dense", "nf4"):
        model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        attach(quantize_nf4(model, double_quant=double_quant) if side == "nf4" else model, seed=0).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(25):
            loss = model(**batch(), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(side, []).append(loss.item())
    assert losses["nf4"][0] == pytest.approx(losses["dense"][0], rel=0.05)
    assert losses["nf4"][-1] < 0.2 * losses["nf4"][0]
    assert losses["nf4"][-1] < 0.1


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_autocast_agrees_with_the_dense_twin(build, compute_dtype):
    model = quantize_nf4(build("bert"), compute_dtype=compute_dtype)
    twin = attach(dense_twin(model), seed=0)
    attach(model, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = backward(perturb(model)), backward(perturb(twin))
    assert_close(mine, theirs, 0.02)  # bf16 rounds by up to 1/256 at each of many places
    for name, grad in gradients(model).items():
        assert_close(grad, gradients(twin)[name], 0.1)


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "hira"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_adds_unmerging_and_detaching_bring_the_bits_back(build, kind, method):
    model = quantize_nf4(build(kind), compute_dtype="fp32")
    modules, quantised, at_first = list(model.modules()), bits(model), logits(model)
    perturb(attach(model, method, trainable=(), seed=0))
    bases = {path: layer.base_layer for path, layer in adapter_layers(model).items()}
    before, unmerged = bits(model), logits(model)
    merge(merge(model))
    torch.testing.assert_close(logits(model), unmerged, atol=1e-5, rtol=1e-5)
    for layer in adapter_layers(model).values():
        assert type(layer.base_layer) is nn.Linear and not any(p.requires_grad for p in layer.base_layer.parameters())
        assert not layer.base_layer.training
    unmerge(model)
    assert {path: layer.base_layer for path, layer in adapter_layers(model).items()} == bases
    assert same_bits(model, before) and torch.equal(logits(model), unmerged)
    detach(merge(model))
    assert list(model.modules()) == modules
    assert same_bits(model, quantised) and torch.equal(logits(model), at_first)


def test_merged_equals_unmerged_in_bf16_but_for_rounding(build):
    model = perturb(attach(quantize_nf4(build("bert")), seed=0)).eval()
    unmerged = logits(model)
    assert_close(logits(merge(model)), unmerged, 0.01)  # the unmerged product is taken in bf16, the merged in fp32
    model = perturb(attach(quantize_nf4(build("bert").bfloat16()), seed=0)).eval()
    unmerged = logits(model)
    assert_close(logits(merge(model)).float(), unmerged.float(), 0.03)


def test_the_merged_weight_is_the_dequantised_one_plus_the_update(build):
    model = perturb(attach(quantize_nf4(build("gpt2")), rank=4, alpha=8, seed=0))
    layer = adapter_layers(model)["transformer.h.0.attn.c_attn"]
    expected = dequantise(layer.base_layer) + 2 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.weight, expected)
    torch.testing.assert_close(merge(model) and layer.base_layer.weight, expected)
    assert layer.bias.dtype == layer.base_layer.weight.dtype == torch.float32


def test_the_error_of_quantising_again(build):
    model = perturb(attach(quantize_nf4(build("bert"), double_quant=False), seed=0))
    report = requantisation_error(model)
    lost = whole = 0.0
    for path, layer in adapter_layers(model).items():
        merged = layer.merged_weight().detach()
        error = dequantise(layer_of(merged)) - merged
        assert report["layers"][path] == pytest.approx((error.norm() / merged.norm()).item(), rel=1e-5)
        lost, whole = lost + error.norm() ** 2, whole + merged.norm() ** 2
    assert report["overall"] == pytest.approx((lost / whole).sqrt().item(), rel=1e-5)
    assert 0.05 < report["overall"] < 0.12
    json.dumps(report)


def test_quantising_again_costs_nothing_without_an_update(build):
    """Codes times scales are their own nearest codes."""
    assert requantisation_error(attach(quantize_nf4(build("bert"), double_quant=False)))["overall"] < 1e-6
    assert requantisation_error(attach(quantize_nf4(build("bert"))))["overall"] < 0.02  # scales are rounded anew


def test_the_error_needs_an_unmerged_adapter_on_4_bits(build):
    with pytest.raises(LorakitError, match="quantize_nf4, then attach"):
        requantisation_error(attach(build("bert")))
    with pytest.raises(LorakitError, match="unmerge"):
        requantisation_error(merge(attach(quantize_nf4(build("bert")))))


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_to_peft_and_back(build, tmp_path, kind):
    from peft import PeftModel

    ours = perturb(attach(quantize_nf4(build(kind), compute_dtype="fp32"), rank=4, alpha=12, seed=0))
    expected = logits(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(quantize_nf4(build(kind), compute_dtype="fp32"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "peft")
    for base in (quantize_nf4(build(kind), compute_dtype="fp32"), build(kind)):  # and onto the dense base
        loaded = load_adapter(base, tmp_path / "peft")
        assert_close(logits(loaded), expected, 1e-5 if four_bit_layers(base) else 0.5)
