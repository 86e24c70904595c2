"""The metric ‖Δh‖/‖h‖ of each adapter, and which are skipped by it."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
import training_runs as runs
from skipping import ALWAYS, batch, both, ours, prepared

from lorakit.adapters.probe import Probe, squared_norms
from lorakit.errors import LorakitError
from lorakit.skip.choice import block_numbers, choose, threshold

# the metric -----------------------------------------------------------------------------------------


def test_m_is_the_ratio_of_norms_over_valid_rows():
    inner, B, h = torch.randn(7, 3), torch.randn(5, 3), torch.randn(7, 5)
    valid = torch.tensor([1.0, 1, 0, 1, 0, 1, 1])
    keep = valid.bool()
    update, output = squared_norms(h, inner, B, 0.7, valid)
    dense = 0.7 * inner @ B.T
    torch.testing.assert_close(update, dense[keep].norm() ** 2)
    torch.testing.assert_close(output, h[keep].norm() ** 2)
    update, output = squared_norms(h, inner, B, 0.7, torch.ones(3))  # pooled rows: the mask is not theirs
    torch.testing.assert_close(update, dense.norm() ** 2)


@both
def test_m_in_a_model_equals_hooks_on_its_layers(build, tiny_bert):
    model, skip = prepared(build, tiny_bert, threshold=0.0)
    inputs, seen = batch(), {}
    path = skip.paths[4]
    layer = model.get_submodule(path)
    reference = copy.deepcopy(layer.base_layer)

    def keep(module, args, out):
        seen["h"], seen["all"] = reference(args[0].detach()), out.detach()

    handle = layer.register_forward_hook(keep)
    skip.begin_step(0.5)
    model(**inputs)
    handle.remove()
    skip.after_step(0.6, None)
    valid = inputs["attention_mask"].bool()
    h, update = seen["h"][valid], (seen["all"] - seen["h"])[valid]
    assert skip.metric[4] == pytest.approx(float(update.norm() / h.norm()), rel=1e-4)
    assert len(set(skip.metric)) == len(skip.metric) == 12


@both
def test_m_accumulates_over_the_batches_of_a_step(build, tiny_bert):
    metric = []
    for split in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        model, skip = prepared(build, tiny_bert, threshold=0.0)
        skip.begin_step(0.5)
        for rows in split:
            model(**{name: value[rows] for name, value in batch().items()}).loss.backward()
        if len(split) == 2:  # neither an evaluation nor a pass without a graph is measured
            model.eval()(**batch(4, 7))
            with torch.no_grad():
                model.train()(**batch(4, 7))
        skip.after_step(0.6, None)
        metric.append(skip.metric)
    assert metric[0] == pytest.approx(metric[1], rel=1e-5)


def test_the_average_starts_at_the_first_measurement_and_replaces_while_warm(tiny_bert):
    model, skip = prepared(ours, tiny_bert, ema=0.25, warmup=0.5)
    skip._measured = lambda probes: [measured] * 12
    skip.probes[0].measuring = True
    skip._warm, skip.metric, measured = False, [1.0] * 12, 2.0
    skip.after_step(0.6, None)
    assert skip.metric == [1.25] * 12
    skip._warm, measured = True, 3.0
    skip.after_step(0.6, None)
    assert skip.metric == [3.0] * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_m_under_autocast_is_measured_in_fp32(dtype):
    inner, B, h = torch.randn(64, 4), torch.randn(32, 4), torch.randn(64, 32)
    exact = squared_norms(h, inner, B, 1.0, None)
    with torch.autocast("cpu", torch.bfloat16):
        low = squared_norms(h.to(dtype), inner.to(dtype), B, 1.0, None)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=0)


def test_a_probe_sees_one_forward_of_a_batch():
    probe, seen = Probe("layer", ()), (torch.ones(2, 4), torch.ones(2, 1), torch.ones(4, 1), 2.0)
    assert probe.active and not probe.refuse_gradient
    probe.see(*seen)
    probe.measuring = True
    probe.see(*seen)  # a recomputation
    assert probe.squares is None
    for batches in (1, 2):
        probe.fresh = True
        probe.see(*seen)
        assert probe.squares.tolist() == [32 * batches, 8 * batches]  # (2·1·1)² and 1² of 8 entries
    probe.fresh, probe.decide = True, lambda own: own is not probe
    probe.see(*seen)
    assert probe.active is False


@pytest.mark.parametrize(("refuses", "active", "needs"), itertools.product((False, True), repeat=3))
def test_a_cut_is_refused_where_it_would_be_undone(refuses, active, needs):
    probe = Probe("layer", (), active=active, refuse_gradient=refuses)
    refused = refuses and not active and needs
    with pytest.raises(LorakitError, match="input of the skipped layer") if refused else nullcontext():
        probe.require_cut(torch.zeros(1, requires_grad=needs))


@both
def test_an_evaluation_is_not_measured(build, tiny_bert):
    model, skip = prepared(build, tiny_bert)
    skip.begin_step(0.5)
    with torch.no_grad():
        model(**batch())
    model.eval()(**batch())
    assert [probe.squares for probe in skip.probes] == [None] * 12


def test_m_is_never_below_zero_where_rounding_alone_is_left():
    for angle in torch.linspace(0.1, 1.5, 50):
        a, b = angle.sin(), angle.cos()
        update, _ = squared_norms(torch.ones(1, 1), torch.stack([a, b])[None], torch.stack([b, -a])[None], 1.0, None)
        assert 0 <= update < 1e-6  # Δh = ab − ba


# the choice -----------------------------------------------------------------------------------------

BLOCKS = [0, 0, 1, 1, 2, 2]
GENERATOR = torch.Generator


def pick(metric, **options) -> str:
    settings = runs.skipping(**ALWAYS | options)
    return "".join("01"[a] for a in choose(metric, BLOCKS, settings, GENERATOR().manual_seed(0)))


@pytest.mark.parametrize(
    ("metric", "options", "active"),
    [([0.1, 0.01, 0.1, 0.01, 0.1, 0.01], {"mode": "adapter"}, "101010"),
     ([0.01] * 6, {"mode": "adapter"}, "100000"),  # the floor
     ([0.01, 0.02, 0.03, 0.04, 0.03, 0.02], {"mode": "adapter", "min_active": 2}, "001100"),
     ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], {"mode": "adapter", "share": 0.5}, "000111"),
     ([0.6, 0.1, 0.5, 0.2, 0.4, 0.3], {"mode": "adapter", "share": 0.5}, "101010"),
     ([0.01, 0.02, 0.01, 0.06, 0.01, 0.01], {}, "001111"),  # one large adapter keeps its block and all above
     ([0.01, 0.06, 0.01, 0.01, 0.01, 0.01], {}, "111111"), ([0.01] * 6, {}, "000011"),
     ([0.1, 0.3, 0.2, 0.1, 0.5, 0.4], {"threshold": 0.3}, "111111"),
     ([0.1, 0.3, 0.2, 0.1, 0.5, 0.4], {"threshold": 0.31}, "000011"),
     ([0.01] * 6, {"min_active": 3}, "001111"), ([0.9, 0.8, 0.1, 0.1, 0.2, 0.3], {"share": 0.7}, "000011"),
     ([0.1, 0.2, 0.3, 0.3, 0.4, 0.5], {"share": 0.3}, "111111"),
     ([0.05] * 6, {"threshold": 0.05}, "111111"), ([0.0] * 6, {"threshold": 0.0}, "111111"),  # below τ, not at it
     ([0.01] * 6, {"explore": 1.0}, "111111"), ([0.01] * 6, {"explore": 1.0, "mode": "adapter"}, "111111")],
)  # fmt: skip
def test_choice(metric, options, active):
    assert pick(metric, **options) == active


def test_exploration_has_its_rate_and_follows_the_generator():
    settings = runs.skipping(**ALWAYS | {"mode": "adapter", "explore": 0.2})
    first, second = GENERATOR().manual_seed(5), GENERATOR().manual_seed(5)
    picks = [choose([0.01] * 6, BLOCKS, settings, first) for _ in range(2000)]
    assert picks == [choose([0.01] * 6, BLOCKS, settings, second) for _ in range(2000)]
    rate = sum(itertools.chain.from_iterable(pick[1:] for pick in picks)) / 10000  # place 0 is the floor's
    assert abs(rate - 0.2) < 4 * (0.2 * 0.8 / 10000) ** 0.5


def test_thresholds():
    assert threshold([0.4, 0.1, 0.3, 0.2], runs.skipping(share=0.5)) == 0.3
    assert threshold([0.4, 0.1], runs.skipping(threshold=0.07)) == 0.07
    assert threshold([*range(100)], runs.skipping(share=0.29)) == 29  # 0.29 · 100 is below 29 in floating point
    settings = runs.skipping(**ALWAYS | {"share": 0.29})
    assert choose([1.0] * 100, [*range(100)], settings, GENERATOR()) == [False] * 29 + [True] * 71


def test_blocks_follow_the_models_numbers():
    paths = ["embeddings_project", "encoder.layer.0.query", "encoder.layer.0.out.dense", "encoder.layer.1.query", "top"]
    assert block_numbers(paths) == [0, 1, 1, 2, 3]
    assert block_numbers([f"layers.{block}.query" for block in range(12)]) == [*range(12)]
