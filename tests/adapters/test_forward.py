"""What an adapter does to its base layer's forward: its hooks, its kept outputs, its own arithmetic, its graph."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import adapter_layers, attach, can_merge, export, merge, quantize_nf4, unmerge
from lorakit.errors import LorakitError, ParameterError
from lorakit.measure.flops import FlopCount


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-0.1, 0.1)


class Shaped(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.ndim + x.shape[1]


class Kept(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


METHODS = ("lora", "hira")
LAYERS = {
    "linear": lambda: nn.Linear(8, 6),
    "no bias": lambda: nn.Linear(8, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 8),
    "scaled": lambda: Scaled(8, 6),
    "clamped": lambda: Clamped(8, 6),
    "shaped": lambda: Shaped(8, 6),
    "kept": lambda: Kept(8, 6),
}
PLAIN = ("linear", "no bias", "conv1d")


def model_of(name, dtype=torch.float32):
    torch.manual_seed(7)
    return nn.Sequential(LAYERS[name](), nn.Tanh()).to(dtype)


def adapted(name, method, dtype=torch.float32):
    model = attach(model_of(name, dtype), method, trainable=(), seed=0)
    with torch.no_grad():
        for parameter in model[0].adapter_parameters().values():
            parameter.normal_(std=0.5)
    return model


def inputs(dtype=torch.float32):
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_is_the_base_layers_own_and_the_update(name, method, dtype):
    model, x = adapted(name, method, dtype), inputs(dtype)
    layer = model[0]
    expected = model_of(name, dtype)[0](x).float() + x.float() @ layer.delta_weight().float().T
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(layer(x).float(), expected, **close)


@pytest.mark.parametrize("name", ["linear", "conv1d", "scaled", "clamped", "shaped"])
def test_a_subclass_is_adapted_as_peft_does(name):
    from peft import LoraConfig, get_peft_model

    model, x = adapted(name, "lora"), inputs()
    theirs = get_peft_model(model_of(name), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    for end in ("lora_A", "lora_B"):
        getattr(theirs.base_model.model[0], end)["default"].weight.data.copy_(getattr(model[0], end))
    torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_on_the_base_layer_are_called_and_keep_what_they_saw(name, method, dtype):
    model, x = adapted(name, method, dtype), inputs(dtype).requires_grad_()
    unhooked = torch.autograd.grad(model(x).sum(), [x, *model[0].adapter_parameters().values()])
    kept, backward = [], []
    base = model[0].base_layer
    base.register_forward_hook(lambda module, given, out: kept.append(out))
    base.register_full_backward_hook(lambda module, given, out: backward.append(out[0]))
    gradients = torch.autograd.grad(model(x).sum(), [x, *model[0].adapter_parameters().values()])
    assert torch.equal(kept[0], model_of(name, dtype)[0](x)) and kept[0].shape == (2, 5, 6) and len(backward) == 1
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for one, other in zip(unhooked, gradients, strict=True):
        torch.testing.assert_close(one, other, **close)


def keep_everywhere(base, kept):
    return nn.modules.module.register_module_forward_hook(lambda m, given, out: kept.append(out) if m is base else None)


def keep_in_a_forward_of_its_own(base, kept):  # as accelerate's hooks do, which bring weights in from elsewhere
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Keep(ModelHook):
        def post_forward(self, module, output):
            kept.append(output)
            return output

    add_hook_to_module(base, Keep())


@pytest.mark.parametrize("keep", [keep_everywhere, keep_in_a_forward_of_its_own])
@pytest.mark.parametrize("method", METHODS)
def test_whoever_looks_at_the_base_layer_keeps_what_it_saw(method, keep):
    model, x, kept = adapted("linear", method), inputs(), []
    handle = keep(model[0].base_layer, kept)
    model(x)
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(kept[0], model_of("linear")[0](x))


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_output_of_a_plain_linear_is_ours_to_change(name):
    layer, plain = adapted(name, "lora")[0], name in ("linear", "no bias")
    assert layer.owns_output is plain
    with FlopCount():  # a mode that keeps nothing
        assert layer.owns_output is plain


def test_a_merged_layer_gives_what_autocast_asks_for():
    with torch.autocast("cpu", torch.bfloat16):
        assert merge(adapted("linear", "lora")).eval()[0](inputs()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_autocast_leaves_double_precision_alone(method):
    model, x = adapted("linear", method, torch.float64), inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(x)
    torch.testing.assert_close(inside, model(x))


def test_a_layer_in_four_bits_comes_back_in_the_mode_the_model_is_in():
    model = merge(attach(quantize_nf4(nn.Sequential(nn.Linear(64, 64))), trainable=()).train())
    assert not any(module.training for module in unmerge(model.eval()).modules())


@pytest.mark.parametrize("plain", [True, False])
def test_only_a_plain_layers_output_is_summed_in_its_place(monkeypatch, plain):
    layer, given = adapted("linear", "lora")[0], []
    layer.base_layer.forward = lambda x: given.append(nn.Linear.forward(layer.base_layer, x)) or given[0]
    monkeypatch.setattr(type(layer), "owns_output", plain)
    assert (layer(inputs()).data_ptr() == given[0].data_ptr()) is plain


def test_an_output_that_a_checkpoint_or_a_transform_holds_is_left_alone():
    model, x = adapted("linear", "lora"), inputs().requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    kept = checkpoint(model, x, use_reentrant=False, context_fn=keep)
    torch.testing.assert_close(torch.autograd.grad(kept.sum(), x)[0], expected)
    layer = model[0].eval()
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in layer.adapter_parameters().items()}
    rows = inputs()
    both = torch.vmap(lambda given: torch.func.functional_call(layer, given, (rows,)))(stacked)
    torch.testing.assert_close(both[0], layer(rows))


# --- what cannot be merged ------------------------------------------------------------------------------------------


def eight_bit():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(8, 6, has_fp16_weights=False)
    layer.weight = nn.Parameter(torch.randint(-127, 127, (6, 8), dtype=torch.int8), requires_grad=False)
    return layer


UNMERGEABLE = {
    "scaled": (LAYERS["scaled"], "does more than a linear map"),
    "clamped": (LAYERS["clamped"], "does more than a linear map"),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 6)), "weight_norm, a parametrisation"),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), "weight_norm, a parametrisation"),
    "8 bits": (eight_bit, r"torch\.int8 \(Linear8bitLt\)"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", UNMERGEABLE)
def test_what_cannot_be_merged_is_refused_and_nothing_is_merged(name):
    build, problem = UNMERGEABLE[name]
    model = attach(nn.Sequential(nn.Linear(8, 8), build(), nn.Linear(6, 8)), trainable=(), seed=0)
    weights = [layer.base_layer.weight.clone() for layer in adapter_layers(model).values()]
    assert not can_merge(model)
    for _ in range(2):
        with pytest.raises(LorakitError, match=f"^1 cannot be merged: .*{problem}"):
            merge(model)
        assert not model.lorakit_attachment.is_merged(model)
        here = [layer.base_layer.weight for layer in adapter_layers(model).values()]
        assert all(torch.equal(one, other) for one, other in zip(here, weights, strict=True))


def test_hira_on_8_bits_is_refused():
    with pytest.raises(ParameterError, match=r"method='hira': needs to read W0, which is torch\.int8"):
        attach(nn.Sequential(eight_bit()), "hira", trainable=())


@pytest.mark.parametrize("kbit", [False, True])
@pytest.mark.parametrize("first", ["merge", "cast"])
def test_merged_four_bits_run_in_another_dtype(tiny_bert, tmp_path, kbit, first):
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForSequenceClassification

    ids = torch.randint(3, 99, (2, 9))
    model = attach(quantize_nf4(tiny_bert().bfloat16().eval()), seed=0, target_modules=["query", "dense"])
    cast = (lambda: prepare_model_for_kbit_training(model)) if kbit else model.float
    steps = [lambda: merge(model), cast]
    for step in steps if first == "merge" else reversed(steps):
        step()
    with torch.no_grad():
        merged = model(input_ids=ids).logits
        expected = unmerge(model)(input_ids=ids).logits
        plain = AutoModelForSequenceClassification.from_pretrained(export(model, tmp_path / "whole"))
        torch.testing.assert_close(merged, expected, atol=0.02, rtol=0.02)
        torch.testing.assert_close(plain.float()(input_ids=ids).logits, expected.float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["linear", "conv1d", "kept"])
def test_a_batch_without_rows_has_an_output_without_rows(name, method):
    assert adapted(name, method)[0](torch.zeros(0, 5, 8)).shape == (0, 5, 6)
