"""One HiRA layer: its formula, gradients, temporaries, and what it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from small_models import conv1d
from torch import nn

from lorakit.adapters import AdapterSettings, HiRALayer, LoRALayer, adapter_layers, attach, merge, unmerge
from lorakit.adapters.hira import _laid_out
from lorakit.errors import LorakitError, ParameterError
from lorakit.measure.flops import FlopCount
from lorakit.measure.live import LiveBytes

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


BASES = [lambda: nn.Linear(5, 7), lambda: nn.Linear(5, 7, bias=False), conv1d]
bases = pytest.mark.parametrize("base", BASES, ids=["linear", "without bias", "Conv1D"])


def layer_of(base, kind=HiRALayer, **settings):
    """A layer as after training, its base with a bias away from zero."""
    with torch.no_grad():
        if base.bias is not None:
            base.bias.normal_()
    layer = kind(base.requires_grad_(False), AdapterSettings(alpha=None, **settings))
    nn.init.normal_(layer.hira_B, generator=torch.Generator().manual_seed(4))
    return layer


@bases
def test_the_layer_is_the_formula(base):
    layer = layer_of(base().double(), rank=3)
    W0 = layer.base_layer.weight.T if layer.transposed else layer.base_layer.weight
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = F.linear(x, W0 * (1 + layer.hira_B @ layer.hira_A), layer.bias)
    assert layer(x).dtype == torch.float64
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], atol=1e-12, rtol=0)
    assert layer(x[:0]).shape == (0, 3, 7)


@bases
def test_closed_form_gradients(base):
    layer = layer_of(base().double(), rank=3)
    W0, A, B = layer.base_weight(), layer.hira_A, layer.hira_B
    X, dY = (torch.randn(11, size, dtype=torch.float64) for size in (5, 7))
    X.requires_grad_()
    layer(X).backward(dY)
    G = dY.T @ X
    torch.testing.assert_close(B.grad, (W0 * G) @ A.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(A.grad, B.T @ (W0 * G), atol=1e-12, rtol=0)
    torch.testing.assert_close(X.grad, dY @ (W0 * (1 + B @ A)), atol=1e-12, rtol=0)
    assert _laid_out(W0, B, A).stride() == W0.stride()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@bases
def test_gradcheck(base, dropout):
    layer = layer_of(base().double(), rank=2, dropout=dropout)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    bias = layer.bias.clone().requires_grad_() if layer.bias is not None else None

    def call(x, A, B, *bias):
        torch.manual_seed(0)  # the same dropout mask every time
        values = {"hira_A": A, "hira_B": B} | ({"base_layer.bias": bias[0]} if bias else {})
        return torch.func.functional_call(layer, values, (x,))

    inputs = (x, layer.hira_A, layer.hira_B, *([bias] if bias is not None else []))
    assert torch.autograd.gradcheck(call, inputs)


def test_a_second_derivative_is_refused_not_wrong():
    layer = layer_of(nn.Linear(3, 4), rank=2)
    x = torch.randn(5, 3, requires_grad=True)
    (dX,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dX.sum().backward()


@pytest.mark.parametrize("base_rank", [3, 24])
def test_the_update_has_a_rank_up_to_the_product_of_ranks(base_rank):
    base = nn.Linear(24, 24).double()
    with torch.no_grad():
        base.weight.copy_(torch.randn(24, base_rank).double() @ torch.randn(base_rank, 24).double())
    layer = layer_of(base, rank=2)
    rank = int(torch.linalg.matrix_rank(layer.delta_weight()))
    assert rank == min(24, 2 * base_rank) > 2


@pytest.mark.parametrize("base", [lambda: nn.Linear(16, 12), lambda: conv1d(16, 12)], ids=["linear", "Conv1D"])
def test_entries_that_are_zero_never_change(base):
    base = base().requires_grad_(False)
    base.weight[torch.rand(base.weight.shape) < 0.4] = 0
    zeros = base.weight == 0
    model = attach(nn.Sequential(base), "hira", trainable=(), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(20):
        model(torch.randn(8, 16)).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = base.weight.clone()
    after = merge(model)[0].base_layer.weight
    assert zeros.any() and torch.equal(after == 0, zeros)
    assert (after - before)[~zeros].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit_where_the_weight_was_wiped_out(dtype):
    model = attach(nn.Sequential(nn.Linear(6, 4, bias=False)).to(dtype), "hira", rank=1, trainable=(), seed=0)
    layer, x = model[0], torch.randn(3, 6).to(dtype)
    nn.init.ones_(layer.hira_A), nn.init.constant_(layer.hira_B, -1.0)  # 1 + BA = 0: no division brings W0 back
    before = layer.base_layer.weight.clone()
    assert torch.equal(merge(model)[0].base_layer.weight, torch.zeros_like(before))
    assert torch.equal(unmerge(model)[0].base_layer.weight, before)
    assert torch.equal(model(x), torch.zeros(3, 4, dtype=dtype))


def test_dropout_acts_in_training_on_the_update_only():
    layer = layer_of(nn.Linear(40, 8), rank=2, dropout=0.5)
    x = torch.randn(6, 40)
    torch.manual_seed(0)
    dropped = layer.train()(x)
    torch.manual_seed(0)
    expected = layer.base_layer(x) + F.linear(F.dropout(x, 0.5), layer.delta_weight())
    torch.testing.assert_close(dropped, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.eval()(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_a_small_coherent_update_survives_a_bf16_base():
    """BA = ±2⁻¹⁰ is lost where W0·(1 + BA) is rounded to bf16, yet moves the output by 2⁻¹⁰ Σ|w x|, a percent."""
    base = nn.Linear(1024, 1, bias=False).bfloat16()
    layer = layer_of(base, rank=1)
    x = torch.randn(1, 1024).bfloat16()
    with torch.no_grad():
        layer.hira_A.copy_((base.weight * x).sign())
        layer.hira_B.fill_(2**-10)
        assert torch.equal(layer.merged_weight(), base.weight)
        moved = (layer(x) - base(x)).item()
    assert moved == pytest.approx(2**-10 * (base.weight * x).float().abs().sum().item(), rel=0.2)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast_multiplies_in_bf16_and_makes_the_weight_in_fp32(dropout):
    layer = layer_of(nn.Linear(64, 48), rank=4, dropout=dropout)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer.eval()(x)
        inside = torch.autograd.grad(out.float().sum(), (x, layer.hira_A, layer.hira_B), retain_graph=True)
    outside = torch.autograd.grad(out.float().sum(), (x, layer.hira_A, layer.hira_B))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(inside, outside, strict=True))
    assert out.dtype == torch.bfloat16
    W0 = layer.base_layer.weight
    weight = torch.addcmul(W0, W0, layer.hira_B @ layer.hira_A).bfloat16()
    assert torch.equal(out, F.linear(x.bfloat16(), weight, layer.bias.bfloat16()))


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@bases
def test_no_matrix_of_the_weights_size_is_saved(base, dropout):
    layer, x, saved = layer_of(base(), rank=2, dropout=dropout), torch.randn(11, 5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.numel() for t in saved) == x.numel() + layer.hira_A.numel() + layer.hira_B.numel()


class Unpacking(HiRALayer):
    """As a 4-bit base: the plain weight exists only while asked for."""

    def base_weight(self):
        self.unpacked = [*getattr(self, "unpacked", []), weakref.ref(weight := super().base_weight().clone())]
        return weight


@bases
def test_an_unpacked_weight_does_not_outlive_the_forward(base):
    layer = layer_of(base(), kind=Unpacking, rank=2)
    out = layer(torch.randn(11, 5))
    assert [weight() for weight in layer.unpacked] == [None]
    out.sum().backward()
    assert [weight() for weight in layer.unpacked] == [None, None]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", [lambda: nn.Linear(96, 128), lambda: conv1d(96, 128)], ids=["linear", "Conv1D"])
def test_one_temporary_of_the_weights_size_at_a_time(base, dropout):
    layer = layer_of(base(), rank=1, dropout=dropout)
    x = torch.randn(2, 96, requires_grad=True)
    live = LiveBytes()
    for tensor in (*layer.parameters(), x):
        live.claim(tensor, "parameters")
    with live:
        layer(x).sum().backward()
    size = layer.base_layer.weight.nbytes
    assert size < live.peak()["activations"] < 1.2 * size


@pytest.mark.parametrize("wanted", ["x", "A", "B", "xAB"])
def test_only_the_gradients_asked_for_are_computed(wanted):
    N, inputs, outputs, r = 17, 24, 40, 2
    layer = layer_of(nn.Linear(inputs, outputs), rank=r)
    x = torch.randn(N, inputs, requires_grad="x" in wanted)
    layer.hira_A.requires_grad_("A" in wanted)
    layer.hira_B.requires_grad_("B" in wanted)
    large, small = 2 * N * inputs * outputs, 2 * r * inputs * outputs
    with FlopCount() as count:
        out = layer(x)
    assert count.total == large + small
    with FlopCount() as count:
        out.sum().backward()
    factors = ("A" in wanted) + ("B" in wanted)
    assert count.total == ("x" in wanted) * (large + small) + bool(factors) * large + factors * small
    assert [t.grad is not None for t in (x, layer.hira_A, layer.hira_B)] == [name in wanted for name in "xAB"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "named"), [({"alpha": 8}, "alpha=8.0"), ({"rslora": True}, "rslora=True")])
def test_alpha_is_refused(build, option, named):
    model = build("bert")
    with pytest.raises(ParameterError, match=f"^{named}: HiRA has no alpha"):
        attach(model, "hira", **option)
    assert not hasattr(model, "lorakit_attachment") and not adapter_layers(model)
    settings = {"alpha": None, "rslora": False} | option
    with pytest.raises(ParameterError, match=f"^{named}: HiRA has no"):
        HiRALayer(nn.Linear(3, 4), AdapterSettings(**settings))
    with pytest.raises(ParameterError, match="^alpha=None: LoRA needs one"):
        LoRALayer(nn.Linear(3, 4), AdapterSettings(alpha=None))


def test_a_base_weight_that_wants_a_gradient_is_refused():
    layer = layer_of(nn.Linear(3, 4))
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(LorakitError, match="frozen"):
        layer(torch.randn(2, 3))
    with torch.no_grad():
        layer(torch.randn(2, 3))
