"""FLOPs against hand formulas and torch's own counter; numbers unchanged under the mode."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from small_models import conv1d
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lorakit.measure.flops import FlopCount

MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


def passes(function) -> tuple[int, int]:
    """FLOPs of the forward and of the backward of `function`."""
    with FlopCount() as forward:
        loss = function()
    with FlopCount() as backward:
        loss.sum().backward()
    return forward.total, backward.total


@pytest.mark.parametrize(
    ("layer", "needs_input", "backward"),
    [
        (lambda: nn.Linear(16, 32), False, 2),
        (lambda: nn.Linear(16, 32), True, 4),
        (lambda: nn.Linear(16, 32, bias=False), False, 2),
        (lambda: nn.Linear(16, 32, bias=False), True, 4),
        (lambda: nn.Linear(16, 32).requires_grad_(False), True, 2),  # frozen: the input's gradient only
        (lambda: conv1d(16, 32), True, 4),
    ],
)
def test_linear(layer, needs_input, backward):
    layer, x = layer(), torch.randn(3, 5, 16, requires_grad=needs_input)
    size = 3 * 5 * 16 * 32
    assert passes(lambda: layer(x)) == (2 * size, backward * size)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_cpu_attention(causal, kv_heads):
    """Forward QK' and AV; the backward recomputes QK' and has four products more."""
    q = torch.randn(2, 4, 8, 16, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 8, 16, requires_grad=True) for _ in range(2))
    product = 2 * 2 * 4 * 8 * 8 * 16
    attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads < 4)  # noqa: E731
    assert passes(attend) == (2 * product, 5 * product)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b: F.linear(a, b), 2 * 2 * 4 * 8 * 8),
        (lambda a, b: a @ b.T, 2 * 2 * 4 * 8 * 8),
        (lambda a, b: torch.matmul(a, b[0]), 2 * 2 * 4 * 8),
        (lambda a, b: torch.matmul(a[:, None], a.mT[None]), 2 * 4 * 2 * 4 * 8 * 4 // 2),
        (lambda a, b: torch.einsum("btk,bsk->bts", a, a), 2 * 2 * 4 * 4 * 8),
        (lambda a, b: F.scaled_dot_product_attention(a[:, None], a[:, None], a[:, None]), 4 * 2 * 4 * 4 * 8),
        (lambda a, b: a[0] @ b[0], 2 * 4 * 8),
        (lambda a, b: torch.dot(b[0], b[1]), 2 * 8),
        (lambda a, b: torch.addmv(b[0, :4], a[0], b[0]), 2 * 4 * 8),
        (lambda a, b: torch.baddbmm(a[:, :, :4], a, a.mT), 2 * 2 * 4 * 8 * 4),
        (lambda a, b: torch.addbmm(a[0, :, :4], a, a.mT), 2 * 2 * 4 * 8 * 4),
        (lambda a, b: F.softmax(a, -1) * a + b[:4].sum(), 0),
    ],
)
def test_products_count_the_same_in_every_grad_mode(mode, function, expected):
    a, b = torch.randn(2, 4, 8), torch.randn(8, 8)
    with mode(), FlopCount() as count:
        function(a, b)
    assert count.total == expected


@pytest.fixture
def models(build):
    ids = torch.randint(0, 99, (2, 16))
    batches = {"bert": {"input_ids": ids, "labels": torch.tensor([0, 1])}, "gpt2": {"input_ids": ids, "labels": ids}}
    return [(build(kind).train(), batch) for kind, batch in batches.items()]


def test_agrees_with_torch_where_torch_counts(models):
    """With eager attention there is no operator torch's counter leaves out."""
    for model, batch in models:
        model.set_attn_implementation("eager")
        with FlopCount() as ours:
            model(**batch).loss.backward()
        with FlopCounterMode(display=False) as theirs:
            model(**batch).loss.backward()
        assert ours.total == theirs.get_total_flops() > 0


def test_sdpa_is_eager_plus_the_recomputation(models):
    for model, batch in models:
        model.eval()  # with dropout the CPU's sdpa falls back to plain products
        with FlopCount() as sdpa:
            model(**batch).loss.backward()
        model.set_attn_implementation("eager")
        with FlopCount() as eager:
            model(**batch).loss.backward()
        scores = 2 * (2 * 2 * 16 * 16 * 16)  # two layers, (B, heads, T, T) with heads of 16
        assert sdpa.total - eager.total == 2 * scores


@pytest.mark.parametrize("autocast", [False, True])
def test_numbers_are_bitwise_unchanged(models, autocast):
    for model, batch in models:
        results = []
        for counted in (False, True):
            torch.manual_seed(3)  # dropout too must draw the same
            model.zero_grad()
            count = FlopCount() if counted else contextlib.nullcontext()
            with count, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            with count:
                loss.backward()
            assert not counted or count.total > 0
            results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        assert all(torch.equal(plain, counted) for plain, counted in zip(*results, strict=True))


def test_autocast_costs_the_same_flops(models):
    for model, batch in models:
        totals = []
        for enabled in (False, True):
            with FlopCount() as count, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(**batch).loss.backward()
            totals.append(count.total)
        assert totals[0] == totals[1]


def test_checkpointing_counts_the_recomputation_in_the_backward():
    layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    x = torch.randn(4, 16, requires_grad=True)
    forward, backward = passes(lambda: layers(x))
    again, longer = passes(lambda: checkpoint(layers, x, use_reentrant=False))
    assert (again, longer) == (forward, backward + forward)


def test_meta_tensors_and_adding_up():
    layer = nn.Linear(16, 32, device="meta")
    count = FlopCount()
    for _ in range(3):
        with count:
            layer(torch.empty(4, 16, device="meta"))
    assert count.total == 3 * 2 * 4 * 16 * 32


@pytest.mark.cuda
def test_cuda_counts_what_the_cpu_counts(models):
    for model, batch in models:
        with FlopCount() as cpu:
            model(**batch).loss.backward()
        batch = {name: value.cuda() for name, value in batch.items()}
        with FlopCount() as cuda:
            model.cuda()(**batch).loss.backward()
        assert cuda.total == cpu.total


def test_a_lora_layer_costs_its_three_products():
    """B's product is added into the base's output in place, by an operator that torch's registry does not know."""
    from lorakit.adapters import AdapterSettings, LoRALayer

    layer = LoRALayer(torch.nn.Linear(48, 32), AdapterSettings(rank=4))
    with FlopCount() as count:
        layer(torch.randn(10, 48))
    assert count.total == 2 * 10 * (48 * 32 + 48 * 4 + 4 * 32)
