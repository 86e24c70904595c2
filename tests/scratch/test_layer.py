"""LoRALinear against the dense formula, autograd and PEFT's LoRA on the same weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorakit.errors import ParameterError
from lorakit.scratch import LoRALinear

D_IN, D_OUT, R, ALPHA = 12, 7, 3, 6.0


def trained(bias: bool = True, dropout: float = 0.0) -> LoRALinear:
    """A layer whose B is no longer zero."""
    layer = LoRALinear(D_IN, D_OUT, R, ALPHA, dropout, bias=bias)
    nn.init.normal_(layer.lora_B)
    return layer


def peft_twin(layer: LoRALinear) -> nn.Module:
    """PEFT's LoRA layer with the same weights."""
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Sequential(nn.Linear(D_IN, D_OUT))
    base[0].load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if "lora" not in name})
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=False)
    twin = inject_adapter_in_model(config, base)[0]
    twin.lora_A["default"].weight.data.copy_(layer.lora_A)
    twin.lora_B["default"].weight.data.copy_(layer.lora_B)
    return twin


@pytest.mark.parametrize("bias", [True, False])
def test_starts_as_the_linear_it_replaces(bias):
    linear = nn.Linear(D_IN, D_OUT, bias=bias)
    layer = LoRALinear(D_IN, D_OUT, R, ALPHA, bias=bias)
    layer.load_state_dict(linear.state_dict(), strict=False)
    x = torch.randn(4, 5, D_IN)
    assert isinstance(layer, nn.Linear) and (layer.bias is None) == (not bias)
    assert torch.equal(layer(x), linear(x))
    assert layer.lora_B.count_nonzero() == 0 and layer.lora_A.count_nonzero() == R * D_IN


def test_starts_with_nn_linears_own_weights():
    torch.manual_seed(5)
    expected = nn.Linear(D_IN, D_OUT)
    torch.manual_seed(5)
    layer = LoRALinear(D_IN, D_OUT, R, ALPHA)
    assert torch.equal(layer.weight, expected.weight) and torch.equal(layer.bias, expected.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_formula_with_an_update_of_at_most_rank_r(bias):
    layer = trained(bias).double()
    x = torch.randn(4, 5, D_IN, dtype=torch.float64)
    update = ALPHA / R * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + update, layer.bias), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.delta_weight(), update)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == R


def test_gradients_are_the_closed_form():
    layer = trained().double()
    x, g = torch.randn(9, D_IN, dtype=torch.float64), torch.randn(9, D_OUT, dtype=torch.float64)
    layer(x).backward(g)
    dense = g.T @ x * ALPHA / R  # of the update
    torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.T @ dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.lora_B.grad, dense @ layer.lora_A.T, atol=1e-12, rtol=0)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_gradcheck():
    layer = trained().double()
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    names = ("lora_A", "lora_B")
    values = tuple(getattr(layer, name).detach().clone().requires_grad_() for name in names)
    call = lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *values))


def test_equals_peft_through_twenty_training_steps():
    layer = trained()
    twin = peft_twin(layer)
    ours = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
    theirs = torch.optim.AdamW([twin.lora_A["default"].weight, twin.lora_B["default"].weight], lr=1e-2)
    for step in range(20):
        x, y = torch.randn(8, D_IN), torch.randn(8, D_OUT)
        losses = [F.mse_loss(model(x), y) for model in (layer, twin)]
        torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
        torch.testing.assert_close(layer.lora_A.grad, twin.lora_A["default"].weight.grad, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(layer.lora_B.grad, twin.lora_B["default"].weight.grad, atol=1e-6, rtol=1e-5)
        if step == 0:
            torch.testing.assert_close(layer(x), twin(x), atol=1e-6, rtol=0)
        ours.step(), theirs.step()


def test_dropout_touches_the_update_only_and_only_in_training():
    layer = trained(dropout=0.5)
    x = torch.randn(64, D_IN)
    base = F.linear(x, layer.weight, layer.bias)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer.train()(x), base)


def test_dropout_leaves_the_mean_of_the_update():
    layer = trained(dropout=0.25).double()
    x = torch.randn(1, D_IN, dtype=torch.float64)
    mean = layer(x.expand(40_000, -1)).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x)[0], atol=0.1, rtol=0)


def test_merged_equals_unmerged_and_unmerging_gives_the_bits_back():
    layer = trained().eval()
    before, x = layer.weight.clone(), torch.randn(5, D_IN)
    unmerged = layer(x)
    for _ in range(3):
        layer.merge()
        layer.merge()
        assert layer.merged
        torch.testing.assert_close(layer(x), unmerged, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.weight, before + layer.delta_weight(), atol=1e-6, rtol=0)
        layer.unmerge()
        layer.unmerge()
        assert not layer.merged and torch.equal(layer.weight, before)
        assert torch.equal(layer(x), unmerged)


def test_merged_forward_is_one_matrix_product():
    from torch.utils.flop_counter import FlopCounterMode

    layer = trained().eval()
    layer.merge()
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(5, D_IN))
    assert counter.get_total_flops() == 2 * 5 * D_IN * D_OUT


def test_saving_or_loading_while_merged_is_refused():
    layer = trained()
    state = layer.state_dict()
    layer.merge()
    for use in (layer.state_dict, lambda: layer.load_state_dict(state), layer.reset_lora):
        with pytest.raises(ParameterError, match="unmerge"):
            use()


def test_state_goes_through_a_file_and_a_copy_keeps_the_merge():
    layer, x = trained(), torch.randn(2, D_IN)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LoRALinear(D_IN, D_OUT, R, ALPHA)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert layer.merged and torch.equal(twin.weight, other.weight)


def test_moves_and_casts_as_a_linear_does():
    layer = LoRALinear(D_IN, D_OUT, R, ALPHA, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert LoRALinear(D_IN, D_OUT, device="meta").lora_A.device.type == "meta"
    layer.merge()
    layer.double().unmerge()
    assert layer.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", 0), ("r", -1), ("r", 2.0), ("r", True), ("lora_alpha", 0), ("lora_alpha", float("nan"))]
    + [("lora_alpha", -1.0), ("lora_dropout", 1.0), ("lora_dropout", -0.1)],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ParameterError) as caught:
        LoRALinear(D_IN, D_OUT, **{name: value})
    assert caught.value.name == name and str(value) in str(caught.value)
