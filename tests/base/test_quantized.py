"""QLoRA: the codebook, what is stored, what is trained, what merging costs; PEFT and dense twins as oracles."""

from __future__ import annotations

import pytest
import torch
from four_bit_models import assert_close, four_bit_layers, layer_of, nf4_bytes
from small_models import KINDS, STILL, backward, bits, gradients, logits, perturb, same_bits
from torch import nn

from lorakit.adapters import adapter_layers, attach, quantize_nf4
from lorakit.base import nf4
from lorakit.base.nf4 import dequantise, is_four_bit, stored_bytes
from lorakit.errors import LorakitError

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


# --- NF4 -------------------------------------------------------------------------------------------------------------


def codebook():
    """Dettmers et al. 2023, section 3: quantiles of a normal, 7 below zero, zero, 8 above, scaled to [-1, 1]."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    codes = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    return codes / codes.abs().max()


def test_the_codebook_is_the_normal_quantiles():
    code = layer_of(torch.randn(8, 64)).weight.quant_state.code
    assert len(code) == 16 and (code < 0).sum() == 7 and (code > 0).sum() == 8
    torch.testing.assert_close(code.double(), codebook(), atol=1e-6, rtol=0)


def test_the_error_of_scales_in_8_bits_is_at_most_half_the_largest_gap_and_theirs():
    """With exact scales every weight has the nearest code: `test_rows_that_are_not_whole_blocks`."""
    weight = torch.randn(64, 192)
    stored = dequantise(layer_of(weight, double_quant=True)).flatten().view(-1, 64)
    scales = weight.flatten().view(-1, 64).abs().amax(1, keepdim=True)
    off = (stored.abs().amax(1, keepdim=True) - scales).abs()
    assert (off <= 0.02 * scales).all()  # half a step of the 8-bit code at the most, here less than 2 %
    error, allowed = (stored - weight.flatten().view(-1, 64)).abs(), scales * codebook().diff().max() / 2
    assert (error <= allowed + off + 1e-6).all()
    assert error.max() > 0.9 * allowed.min()  # the bound is not idle


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(8, 64), (4, 32), (12, 96), (4, 80), (6, 130), (5, 14), (7, 129), (3, 3), (3, 1)])
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
    assert (type(layer).__module__ == "lorakit.base.linear4bit") == bool(shape[1] % 64)
    assert layer.quant_state is layer.weight.quant_state  # where bitsandbytes looks for it after a move
    x = torch.randn(2, 5, shape[1], requires_grad=True)
    out = layer(x)
    out.sum().backward()
    tolerance = {"bf16": 0.02, "fp32": 1e-6}[compute_dtype]
    assert_close(out.detach(), x.detach() @ expected.T + layer.bias.float(), tolerance)
    assert_close(x.grad, torch.ones(2, 5, shape[0]) @ expected, tolerance)
    torch.testing.assert_close(dequantise(layer), expected, atol=1e-6, rtol=0)
    assert layer(x[:0]).shape == (0, 5, shape[0])


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float32])
def test_the_product_is_taken_in_the_compute_dtype_and_everything_gets_its_gradient(compute_dtype):
    layer = quantize_nf4(nn.Sequential(nn.Linear(14, 5)), compute_dtype="fp32")[0]
    layer.compute_dtype = compute_dtype  # None: as bitsandbytes' own before its first forward
    layer.bias.requires_grad_(True)
    dtype = compute_dtype or torch.float32
    x, weights = torch.randn(2, 3, 14, requires_grad=True), torch.randn(2, 3, 5)
    twin, bias = (side.detach().clone().requires_grad_() for side in (x, layer.bias))
    out = layer(x)
    expected = nn.functional.linear(twin.to(dtype), dequantise(layer, dtype), bias.to(dtype)).float()
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    for side in (out, expected):
        (side * weights).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad, atol=0.05 * (dtype != torch.float32) + 1e-6, rtol=0)


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
    told = model.config.quantization_config
    assert (told.load_in_4bit, told.bnb_4bit_quant_type, told.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert told.bnb_4bit_compute_dtype == torch.bfloat16
    replaced = list(four_bit_layers(model))
    assert replaced == list(adapter_layers(attach(dense)))  # the layers that get an adapter by "all-linear"
    assert all(module is modules[path] for path, module in model.named_modules() if path not in replaced)
    for path, layer in four_bit_layers(model).items():
        old = modules[path]
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.blocksize == 64
        assert layer.weight.quant_state.nested and not layer.weight.requires_grad
        assert layer.support_avx512bf16_for_cpu is False and layer.training is old.training
        assert nf4.dense(layer).training is old.training
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
    model = quantize_nf4(build("bert", **STILL["bert"], **sizes))
    attach(foreign(model) if loader == "foreign" else model, seed=0)
    assert not any(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(model).values())
    perturb(model).eval()
    packed = bits(model)
    evaluated = logits(model)
    assert same_bits(model, packed)
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


@pytest.mark.parametrize("real", [False, True])
def test_a_layer_packed_anew_before_attach_is_refused(build, real):
    model = foreign(quantize_nf4(build("bert", **EVEN))).eval()
    if not real:
        next(iter(four_bit_layers(model).values())).weight.quant_state.packing_format_for_cpu = True
    elif has_the_trap():
        logits(model)
    else:
        pytest.skip("no AVX512-BF16 on this CPU")
    with pytest.raises(LorakitError, match=r"layer\.0\.attention\.self\.query: an evaluation before attach"):
        attach(model)
    assert not adapter_layers(model) and not hasattr(model, "lorakit_attachment")
