"""QLoRA: the codebook, what is stored, what is trained, what merging costs; PEFT and dense twins as oracles."""

from __future__ import annotations

import copy
import json
import logging
import sys

import pytest
import torch
from torch import nn

from lorakit.adapters import (
    adapter_layers,
    attach,
    detach,
    load_adapter,
    merge,
    parameter_stats,
    quantize_nf4,
    requantisation_error,
    save_adapter,
    unmerge,
)
from lorakit.adapters.attachment import trained_tensors
from lorakit.adapters.state import adapter_state
from lorakit.base.nf4 import dequantise, is_four_bit, nf4_bytes, stored_bytes
from lorakit.errors import LorakitError, ParameterError
from lorakit.measure.flops import FlopCount
from lorakit.measure.live import LiveBytes
from lorakit.measure.memory import predict_step_memory
from lorakit.measure.weights import weight_table
from lorakit.runs.assembly import optimizer_note

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
KINDS = ["bert", "gpt2", "gemma"]


@pytest.fixture
def build(tiny_bert, tiny_gpt2, tiny_gemma):
    """`build(kind)`: the same small model at every call."""
    builders = {"bert": tiny_bert, "gpt2": tiny_gpt2, "gemma": tiny_gemma}

    def build(kind, **overrides):
        torch.manual_seed(7)
        return builders[kind](**overrides).eval()

    return build


def batch():
    ids = torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def perturb(model):
    """Weights as after training: the adapters away from where they started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def backward(model):
    """Gradients of a fixed random projection of the logits."""
    out = model(**batch()).logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out.float() * weights).sum().backward()
    return out.detach()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def four_bit_layers(model):
    return {path: module for path, module in model.named_modules() if is_four_bit(module)}


def dense_twin(model):
    """A copy whose 4-bit layers are plain linear ones holding the very weights they stand for."""
    twin = copy.deepcopy(model)
    for path, layer in four_bit_layers(twin).items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight = nn.Parameter(dequantise(layer))
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().float())
        twin.set_submodule(path, dense)
    return twin.eval()


def assert_close(mine, oracle, tolerance):
    """The difference is below `tolerance` of the oracle's norm, and the oracle is not nothing."""
    assert oracle.norm() > 1e-4
    assert (mine - oracle).norm() <= tolerance * oracle.norm()


def bits(model):
    """Everything stored, the scales of 4-bit weights too."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- NF4 -------------------------------------------------------------------------------------------------------------


def codebook():
    """Dettmers et al. 2023, section 3: quantiles of a normal, 7 below zero, zero, 8 above, scaled to [-1, 1]."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    codes = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    return codes / codes.abs().max()


def layer_of(weight, double_quant=False):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = nn.Parameter(weight)
    return quantize_nf4(model, double_quant=double_quant, compute_dtype="fp32")[0]


def test_the_codebook_is_the_normal_quantiles():
    code = layer_of(torch.randn(8, 64)).weight.quant_state.code
    assert len(code) == 16 and (code < 0).sum() == 7 and (code > 0).sum() == 8
    torch.testing.assert_close(code.double(), codebook(), atol=1e-6, rtol=0)


def test_every_weight_is_rounded_to_the_nearest_code_of_its_block():
    weight = torch.randn(48, 80)
    blocks = weight.flatten().view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scales)[..., None] - codebook().float()).abs().argmin(-1)
    expected = (codebook().float()[nearest] * scales).view(48, 80)
    torch.testing.assert_close(dequantise(layer_of(weight)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_error_is_at_most_half_the_largest_gap(double_quant):
    weight = torch.randn(64, 192)
    layer = layer_of(weight, double_quant)
    scales = weight.flatten().view(-1, 64).abs().amax(1, keepdim=True)
    error = (dequantise(layer) - weight).flatten().view(-1, 64).abs()
    allowed = scales * codebook().diff().max() / 2
    if double_quant:  # a scale is off by half a step of the 8-bit code at the most, here by less than 2 %
        stored = dequantise(layer).flatten().view(-1, 64).abs().amax(1, keepdim=True)
        assert ((stored - scales).abs() <= 0.02 * scales).all()
        allowed = allowed + (stored - scales).abs()
    assert (error <= allowed + 1e-6).all()
    assert error.max() > 0.9 * (scales * codebook().diff().max() / 2).min()  # the bound is not idle


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(8, 64), (4, 32), (12, 96), (4, 80), (6, 130), (5, 14), (7, 129), (3, 3)])
def test_rows_that_are_not_whole_blocks(shape, compute_dtype):
    """bitsandbytes' own CPU kernel takes scales of other blocks there, on some processors."""
    weight = torch.randn(shape)
    padded = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = padded.abs().amax(1, keepdim=True)
    nearest = ((padded / scales)[..., None] - codebook().float()).abs().argmin(-1)
    expected = (codebook().float()[nearest] * scales).flatten()[: weight.numel()].view(shape)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    model[0].weight = nn.Parameter(weight)
    layer = quantize_nf4(model, double_quant=False, compute_dtype=compute_dtype)[0]
    x = torch.randn(2, 5, shape[1], requires_grad=True)
    out = layer(x)
    out.sum().backward()
    tolerance = {"bf16": 0.02, "fp32": 1e-6}[compute_dtype]
    assert_close(out.detach(), x.detach() @ expected.T + layer.bias.float(), tolerance)
    assert_close(x.grad, torch.ones(2, 5, shape[0]) @ expected, tolerance)
    torch.testing.assert_close(dequantise(layer), expected, atol=1e-6, rtol=0)
    assert layer(x[:0]).shape == (0, 5, shape[0])


@pytest.mark.parametrize("shape", [(64, 64), (384, 1536), (33, 66), (7, 20), (3, 2)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_formula_and_stored_bytes_agree(shape, double_quant):
    layer = layer_of(torch.randn(shape), double_quant)
    assert stored_bytes(layer.weight) == nf4_bytes(shape[0] * shape[1], double_quant)
    assert dequantise(layer).shape == shape


def test_bits_per_parameter():
    count = 64 * 256 * 4096
    codebooks = 8 * (16 + 256 + 1) * 4 / count
    assert 8 * nf4_bytes(count) / count == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + codebooks, abs=1e-12)
    assert round(8 * nf4_bytes(count) / count, 3) == 4.127
    assert round(8 * nf4_bytes(count, double_quant=False) / count, 3) == 4.5


# --- what is replaced ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_the_heads_are_replaced(build, kind):
    model, dense = build(kind), build(kind)
    modules = dict(model.named_modules())
    random = torch.get_rng_state()
    assert quantize_nf4(model) is model
    assert torch.equal(torch.get_rng_state(), random)
    replaced = list(four_bit_layers(model))
    assert replaced == list(adapter_layers(attach(dense)))  # the layers that get an adapter by "all-linear"
    assert all(module is modules[path] for path, module in model.named_modules() if path not in replaced)
    for path, layer in four_bit_layers(model).items():
        old = modules[path]
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.blocksize == 64
        assert layer.weight.quant_state.nested and not layer.weight.requires_grad
        assert layer.support_avx512bf16_for_cpu is False and layer.training is old.training
        assert layer.bias is None or torch.equal(layer.bias, old.bias.bfloat16())
        weight = old.weight.T if kind == "gpt2" else old.weight
        assert_close(dequantise(layer), weight.detach(), 0.12)  # NF4 of a normal: 9 %
    assert_close(logits(model), logits(build(kind)), 0.35)  # a random model: errors of layers do not cancel


def test_tied_embeddings_stay_tied_and_exact(build):
    for kind in ("gemma", "gpt2"):
        model, before = build(kind), build(kind).get_input_embeddings().weight
        quantize_nf4(model)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_keep_their_dtype(build, kind, dtype):
    model = attach(quantize_nf4(build(kind).to(dtype)), seed=0)
    assert all(dequantise(layer).dtype == dtype for layer in four_bit_layers(model).values())
    assert {layer.lora_A.dtype for layer in adapter_layers(model).values()} == {torch.float32}
    assert backward(model).dtype == dtype
    assert all(grad is not None for grad in gradients(model).values())


def test_a_module_with_two_names_stays_one(build):
    model = build("bert")
    first, second = model.bert.encoder.layer
    second.attention.self.query = first.attention.self.query
    quantize_nf4(model)
    assert second.attention.self.query is first.attention.self.query and is_four_bit(first.attention.self.query)


def test_named_modules_stay(build):
    model = quantize_nf4(build("bert"), exclude=["query", "layer.1"])
    paths = list(four_bit_layers(model))
    assert paths and not [path for path in paths if "query" in path or "layer.1" in path]


# --- gradients on CPUs with AVX512-BF16 ------------------------------------------------------------------------------

EVEN, UNEVEN = {"hidden_size": 64, "intermediate_size": 128}, {"hidden_size": 40, "intermediate_size": 72}


def has_the_trap():
    import bitsandbytes

    return bitsandbytes.functional.has_avx512bf16()


def foreign(model):
    """The 4-bit layers as another loader leaves them: bitsandbytes' own defaults."""
    from bitsandbytes.functional import has_avx512bf16

    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = has_avx512bf16()
    return model


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("loader", ["ours", "foreign"])
def test_gradients_flow_after_an_evaluation(build, sizes, loader):
    model = quantize_nf4(build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))
    attach(foreign(model) if loader == "foreign" else model, seed=0)
    perturb(model).eval()
    packed = bits(model)
    evaluated = logits(model)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in bits(model).items())
    trained = backward(model.train())
    assert torch.equal(trained, evaluated)
    for name, grad in gradients(model).items():
        assert grad.norm() > 1e-6, name


def test_gradients_flow_from_an_unadapted_layer_to_an_adapted_one_below(build):
    model = foreign(quantize_nf4(build("bert", **EVEN)))
    perturb(attach(model, target_modules=r".*layer\.0\..*query", seed=0)).eval()
    logits(model)
    backward(model.train())
    assert all(grad.norm() > 1e-6 for grad in gradients(model).values())


@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel was not registered:UserWarning")
def test_without_the_remedy_the_gradient_is_lost():
    """That the trap is real here: else the two tests above prove nothing."""
    if not has_the_trap():
        pytest.skip("no AVX512-BF16 on this CPU")
    layer = layer_of(torch.randn(64, 64))
    x = torch.randn(3, 64, requires_grad=True)
    layer(2 * x).sum().backward()
    assert x.grad.norm() > 0
    x.grad, layer.support_avx512bf16_for_cpu = None, True
    with torch.no_grad():
        layer.eval()(x.detach())
    layer.train()(2 * x).sum().backward()
    assert x.grad is None


def test_a_layer_packed_anew_before_attach_is_refused(build):
    if not has_the_trap():
        pytest.skip("no AVX512-BF16 on this CPU")
    model = foreign(quantize_nf4(build("bert", **EVEN))).eval()
    logits(model)
    with pytest.raises(LorakitError, match=r"layer\.0\.attention\.self\.query: an evaluation before attach"):
        attach(model)
    assert not adapter_layers(model) and not hasattr(model, "lorakit_attachment")


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
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    before = bits(model)
    assert any(name.endswith("weight.absmax") for name in before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model.train()
        model(**batch()).logits.square().mean().backward()
        optimizer.step()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.zero_grad()
        logits(model.eval())
    for name, tensor in bits(model).items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


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


def test_checkpointing_gives_the_same_gradients(build):
    """The adapter adds into the base's output in place; recomputing must not see the sum twice."""
    sides = []
    for checkpointing in (False, True):
        model = perturb(attach(quantize_nf4(build("gemma")), seed=0)).train()
        model.config.use_cache = False
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        backward(model)
        sides.append(gradients(model))
    for name, grad in sides[0].items():
        torch.testing.assert_close(grad, sides[1][name])


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
def test_merged_equals_unmerged_and_unmerging_brings_the_bits_back(build, kind, method):
    model = perturb(attach(quantize_nf4(build(kind), compute_dtype="fp32"), method, seed=0)).eval()
    bases = {path: layer.base_layer for path, layer in adapter_layers(model).items()}
    before, unmerged = bits(model), logits(model)
    merge(merge(model))
    torch.testing.assert_close(logits(model), unmerged, atol=1e-5, rtol=1e-5)
    for layer in adapter_layers(model).values():
        assert type(layer.base_layer) is nn.Linear and not layer.base_layer.weight.requires_grad
    unmerge(model)
    assert {path: layer.base_layer for path, layer in adapter_layers(model).items()} == bases
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    assert torch.equal(logits(model), unmerged)


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


def test_detach_brings_the_quantised_model_back(build):
    model = quantize_nf4(build("gemma"))
    modules, before, at_first = list(model.modules()), bits(model), logits(model)
    merge(perturb(attach(model, seed=0)))
    detach(model)
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    assert torch.equal(logits(model), at_first)


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


# --- PEFT ------------------------------------------------------------------------------------------------------------

TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def peft_model(base, kind):
    from peft import LoraConfig, get_peft_model

    task = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]} if kind == "bert" else {}
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS[kind], **task)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_outputs_and_gradients_equal_pefts(build, kind, compute_dtype):
    from peft import set_peft_model_state_dict
    from peft.tuners.lora.bnb import Linear4bit

    ours, theirs = (quantize_nf4(build(kind), compute_dtype=compute_dtype) for _ in range(2))
    perturb(attach(ours, rank=4, alpha=12, target_modules=TARGETS[kind], seed=0))
    theirs = peft_model(theirs, kind)
    assert any(isinstance(module, Linear4bit) for module in theirs.modules())  # PEFT's own for 4 bits
    state = {f"base_model.model.{name}": tensor for name, tensor in adapter_state(ours).items()}
    assert not set_peft_model_state_dict(theirs, state).unexpected_keys
    rounding = {"fp32": (1e-5, 1e-4), "bf16": (5e-3, 0.05)}[compute_dtype]  # gradients of fp32 sums, rounded in bf16
    assert_close(backward(ours), backward(theirs), rounding[0])
    named = {name.replace(".default", "").removeprefix("base_model.model."): g for name, g in gradients(theirs).items()}
    mine = {name: tensor.grad for name, tensor in trained_tensors(ours).items()}
    for name, grad in mine.items():
        peft = named.get(name, named.get(name.replace("classifier", "classifier.modules_to_save")))
        assert_close(grad, peft, rounding[1])


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


# --- accounting ------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_as_in_the_dense_model(build):
    for kind in KINDS:
        assert parameter_stats(attach(quantize_nf4(build(kind)), seed=0)) == parameter_stats(
            attach(build(kind), seed=0)
        )


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_and_the_real_table_agree(build, kind, double_quant):
    planned = weight_table(build(kind), quantize="nf4", double_quant=double_quant)
    model = quantize_nf4(build(kind), double_quant=double_quant)
    assert weight_table(model) == planned
    tensors = {id(p): p for p in model.parameters()}.values()
    assert planned["base"]["bytes"] == sum(map(stored_bytes, tensors))
    attached = weight_table(attach(model, trainable=(), rank=4))
    assert attached["base"] == planned["base"]
    assert attached["rows"][:-1] == planned["rows"]
    adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adapter_layers(model).values())
    assert attached["rows"][-1] == {
        "kind": "adapters",
        "parameters": adapters,
        "bytes": 4 * adapters,
        "bits_per_parameter": 32,
    }
    json.dumps(attached)


def test_the_table_of_a_dense_model(build):
    table = weight_table(build("gpt2").bfloat16())
    assert [row["kind"] for row in table["rows"]] == ["linear, other", "embeddings", "norms and biases"]
    assert table["base"]["bits_per_parameter"] == 16 and table["times_smaller_than_fp16"] == 1


def test_pefts_adapters_are_told_from_the_base(build):
    base = quantize_nf4(build("gemma"))
    before = weight_table(base)
    after = weight_table(peft_model(base, "gemma"))
    assert after["base"] == before["base"] and after["rows"][-1]["kind"] == "adapters"


REAL = [("distilbert-base-uncased", "classify", 1.888), ("all-MiniLM-L6-v2", "classify", 1.540)]
REAL += [("gemma-3-270m", "causal", 1.384)]


@pytest.mark.parametrize(("name", "kind", "ratio"), REAL)
def test_the_honest_ratio_of_real_models(name, kind, ratio):
    """Against fp16 throughout, with what is not quantised in fp16 too: embeddings keep it far from fourfold."""
    from lorakit.models import configs
    from lorakit.runs.plan import build

    model = build(configs._packaged(name).config, kind, "bf16")
    table = weight_table(model, quantize="nf4")
    counts = {row["kind"]: row["parameters"] for row in table["rows"]}
    rest = sum(counts.values()) - counts["linear, 4-bit"]
    assert table["times_smaller_than_fp16"] == pytest.approx(ratio, abs=0.005)
    by_hand = 16 * sum(counts.values()) / (4.127 * counts["linear, 4-bit"] + 16 * rest)
    assert table["times_smaller_than_fp16"] == pytest.approx(by_hand, rel=0.01)
    assert table["rows"][0]["bits_per_parameter"] <= 4.2


def test_flops_are_those_of_the_dense_model(build):
    for kind in KINDS:
        counts = []
        quantised = quantize_nf4(build(kind))
        for model in (dense_twin(quantised), quantised):
            attach(model, seed=0)
            with FlopCount() as training:
                backward(model.train())
            with FlopCount() as evaluation, torch.inference_mode():
                model.eval()(**batch())
            counts.append((training.total, evaluation.total))
        assert counts[0] == counts[1] and min(counts[0]) > 0


def test_predicted_weights_are_the_bytes_there_are(build):
    model = attach(quantize_nf4(build("gemma")), rank=4, seed=0)
    rows = weight_table(model)["rows"]
    buffers = {b.untyped_storage().data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
    weights, before = sum(row["bytes"] for row in rows), bits(model)
    predicted = predict_step_memory(model, {**batch(), "labels": batch()["input_ids"]})
    assert predicted["parameters"] == weights + sum(buffers.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    assert all(is_four_bit(layer.base_layer) for layer in adapter_layers(model).values())


def test_the_unpacked_weight_is_seen_while_it_lives():
    model = quantize_nf4(nn.Sequential(nn.Linear(256, 1024, bias=False)))
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    with LiveBytes() as live, torch.no_grad():
        live.claim(model[0].weight, "parameters")
        model(x)
    activations = live.peak()["activations"]
    unpacked, scale, out = 2 * 256 * 1024, 4 * 256 * 1024 // 64, 2 * 2 * 1024  # bf16, fp32, bf16
    assert unpacked + scale + out <= activations <= unpacked + 2 * scale + out  # scales before and after adding m


@pytest.mark.parametrize("options", [{}, {"autocast": "bf16", "gradient_checkpointing": True}], ids=["plain", "both"])
def test_predicted_peak_is_the_measured_one(build, options):
    from benchmarks._profiled import measured_step_peak, training_step

    inputs = {**batch(), "labels": torch.tensor([0, 1, 1, 0])}

    def model():
        return attach(quantize_nf4(build("bert", hidden_size=64, intermediate_size=256)), seed=0)

    def step():
        made = model()
        made.config.use_cache = False
        if "gradient_checkpointing" in options:
            made.activation_checkpointing_enable({"use_reentrant": False})
        return training_step(made, {k: v.clone() for k, v in inputs.items()}, options.get("autocast"))

    assert predict_step_memory(model(), inputs, **options)["peak"] == pytest.approx(measured_step_peak(step), rel=0.01)


# --- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_named_optimizers_step_and_their_state_is_as_predicted(build, tmp_path, name):
    from transformers import Trainer

    from lorakit.measure.optimizers import make_optimizer
    from lorakit.params import Params
    from lorakit.training.arguments import training_arguments

    arguments = training_arguments(Params(optimizer=name), str(tmp_path))
    assert arguments.optim == name
    model = attach(quantize_nf4(build("bert", hidden_size=64, intermediate_size=1024)), rank=8, seed=0)
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    assert type(optimizer).__module__.startswith("bitsandbytes")
    before = adapter_state(model)
    backward(model)
    optimizer.step()
    assert all(not torch.equal(tensor, before[key]) for key, tensor in adapter_state(model).items() if "lora_B" in key)
    trained = [p for p in model.parameters() if p.requires_grad]
    predicted = make_optimizer(name, trained, foreach=False)
    predicted.step()
    sizes = [
        {k: v.numel() * v.element_size() for k, v in side.state[p].items() if torch.is_tensor(v) and "qmap" not in k}
        for side in (optimizer, predicted)
        for p in trained
    ]
    assert sizes[: len(trained)] == sizes[len(trained) :]
    assert any("absmax1" in size for size in sizes) == ("8bit" in name)


def test_the_note_says_that_nothing_pages():
    assert optimizer_note("paged_adamw_8bit", "cpu") == (
        "optimizer 'paged_adamw_8bit': nothing pages on cpu; its state stays in memory, unpaged"
    )
    assert optimizer_note("paged_adamw_8bit", "cuda") is None
    assert optimizer_note("adamw_8bit", "cpu") is None


# --- bad input -------------------------------------------------------------------------------------------------------


def untouched(model):
    return not four_bit_layers(model) and not hasattr(model, "is_loaded_in_4bit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "fp16"}, "compute_dtype='fp16': fp16 diverged on 20 % .* must be one of bf16, fp32"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8': must be one of"),
        ({"double_quant": "yes"}, "double_quant='yes'"),
        ({"exclude": ["no_such"]}, "exclude='no_such': matches no module"),
        ({"exclude": "query"}, "exclude='query': must be"),
        ({"exclude": ["bert"]}, "quantize='nf4': BertForSequenceClassification has no linear layer outside"),
    ],
)
def test_bad_options(build, options, message):
    model = build("bert")
    with pytest.raises(ParameterError, match=message):
        quantize_nf4(model, **options)
    assert untouched(model)


def spoil_double(query):
    query.weight = nn.Parameter(query.weight.double())


def spoil_integer(query):
    query.weight = nn.Parameter(torch.ones_like(query.weight, dtype=torch.int8), requires_grad=False)


def spoil_meta(query):
    query.weight = nn.Parameter(query.weight.to("meta"))


def spoil_nan(query):
    query.weight.data[3, 3] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_double, "has torch.float64 weights"),
        (spoil_integer, "has torch.int8 weights"),
        (spoil_meta, "meta device"),
        (spoil_nan, "not finite"),
    ],
)
def test_a_layer_that_cannot_be_held_is_named(build, spoil, message):
    model = build("bert")
    spoil(model.bert.encoder.layer[1].attention.self.query)
    with pytest.raises(ParameterError, match=rf"quantize='nf4': bert.encoder.layer.1.attention.self.query .*{message}"):
        quantize_nf4(model)
    assert untouched(model)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)])
def test_layers_of_one_or_two_weights_are_refused(shape):
    with pytest.raises(ParameterError, match="0 has [12] weights"):
        quantize_nf4(nn.Sequential(nn.Linear(*shape)))


def test_a_layer_read_past_its_forward_is_refused():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ParameterError, match="self_attn.out_proj is a NonDynamicallyQuantizableLinear"):
        quantize_nf4(model)
    assert list(four_bit_layers(quantize_nf4(model, exclude=["out_proj"]))) == ["linear1", "linear2"]


def test_a_weight_tied_to_what_stays_is_refused():
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ParameterError, match=r"1 shares its weight with 0.weight; exclude=\['1'\]"):
        quantize_nf4(model)


def test_twice_is_refused(build):
    model = quantize_nf4(build("bert"))
    with pytest.raises(ParameterError, match="query is in 4 bits already"):
        quantize_nf4(model)


def test_after_an_adapter_is_refused(build):
    for model in (attach(build("bert")), peft_model(build("bert"), "bert")):
        with pytest.raises(ParameterError, match="quantize='nf4': the model already has an adapter"):
            quantize_nf4(model)
        assert untouched(model)


def test_without_bitsandbytes(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = build("bert")
    with pytest.raises(ParameterError, match="quantize='nf4': needs bitsandbytes"):
        quantize_nf4(model)
    assert untouched(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full"}, "the whole model.*is in 4 bits, which cannot train"),
        ({"trainable": ["layer.1.output.dense"]}, "trainable='bert.encoder.layer.1.output.dense'.*is in 4 bits"),
    ],
)
def test_packed_weights_are_not_trained_in_full(build, options, message):
    model = quantize_nf4(build("bert"))
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ParameterError, match=message):
        attach(model, **options)
    assert not adapter_layers(model) and [p.requires_grad for p in model.parameters()] == flags


def test_bad_table_options(build):
    with pytest.raises(ParameterError, match="quantize='int8'"):
        weight_table(build("bert"), quantize="int8")
    with pytest.raises(ParameterError, match="compute_dtype='fp16'"):
        weight_table(build("bert"), quantize="nf4", compute_dtype="fp16")


def test_bitsandbytes_says_nothing_when_imported():
    """It would say on stderr, at its import by transformers or PEFT, that a kernel it could download is missing."""
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


# --- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_cuda_as_on_the_cpu(build):
    here = perturb(attach(quantize_nf4(build("gemma"), compute_dtype="fp32"), seed=0))
    there = perturb(attach(quantize_nf4(build("gemma").cuda(), compute_dtype="fp32"), seed=0))
    moved = perturb(attach(quantize_nf4(build("gemma"), compute_dtype="fp32"), seed=0)).cuda()
    expected = logits(here)
    for model in (there, moved):
        inputs = {name: value.cuda() for name, value in batch().items()}
        out = model(**inputs).logits
        assert_close(out.detach().cpu(), expected, 1e-3)
        out.square().mean().backward()
        assert all(grad.norm() > 0 for grad in gradients(model).values())
        merge(model)
        assert_close(model(**inputs).logits.detach().cpu(), expected, 1e-3)
        unmerge(model)


@pytest.mark.assets("gemma-3-270m")
def test_gemma_from_its_dequantised_file():
    from lorakit import models

    loaded = models.load("gemma-3-270m", "causal", dtype="bf16")
    embeddings = loaded.model.get_input_embeddings().weight.clone()
    model = attach(quantize_nf4(loaded.model), rank=4, seed=0)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = loaded.tokenizer("The capital of France is Paris.", return_tensors="pt")
    loss = model(**ids, labels=ids["input_ids"]).loss
    assert loss < 5  # a model that knows nothing: log 262144 = 12.5
    loss.backward()
    assert all(layer.lora_B.grad.norm() > 0 for layer in adapter_layers(model).values())
    assert weight_table(model)["times_smaller_than_fp16"] == pytest.approx(1.38, abs=0.01)
