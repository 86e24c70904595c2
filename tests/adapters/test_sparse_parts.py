"""Sparse LoRA's parts on matrices small enough to work out by hand."""

from __future__ import annotations

import json

import pytest
import sparse_models
import torch
import training_runs as runs
from torch import nn

from lorakit.adapters import AdapterSettings, LoRALayer, adapter_layers, sparsity_report
from lorakit.adapters.sparse import best_path, has_path
from lorakit.adapters.sparsify import Sparsifier
from lorakit.adapters.zeros import living_ranks

model = sparse_models.model
moved = sparse_models.moved


def layer_of(A, B):
    """A layer with these factors and a weight of ones."""
    A, B = torch.tensor(A, dtype=torch.float32), torch.tensor(B, dtype=torch.float32)
    layer = LoRALayer(nn.Linear(A.shape[1], len(B)), AdapterSettings(rank=len(A), alpha=8 * len(A)))
    layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)
    nn.init.ones_(layer.base_layer.weight)
    return layer


# --- which ranks live ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("A", "B", "alive", "living"),
    [
        ([[0, 0], [1, 0]], [[1, 0]], False, [0]),
        ([[0, 1], [0, 0], [2, 0]], [[0, 5, 0]], False, [1]),  # none lives: the largest |A_k| + |B_k| is kept
        ([[0, 1], [0, 0], [2, 0]], [[0, 1, 0]], False, [2]),
        ([[0, 0], [1, 0]], [[0, 2]], True, [1]),
        ([[1, 1], [0, 0]], [[1, 2]], True, [0]),
        ([[0, 1], [0, 0], [2, 0]], [[1, 0, 4]], True, [0, 2]),
    ],
)
def test_a_rank_lives_where_both_factors_do(A, B, alive, living):
    layer = layer_of(A, B)
    assert has_path(layer.lora_A, layer.lora_B).item() is alive
    assert living_ranks(layer).tolist() == living


def test_best_path_is_the_strongest_shared_rank():
    A, B = torch.tensor([[3.0, -4.0], [9.0, 1.0], [2.0, 5.0]]), torch.tensor([[1.0, 0.0, -2.0], [-3.0, 0.5, 1.0]])
    none, first = torch.zeros(3, 2, dtype=torch.bool), torch.tensor([[True, True], [False, False], [False, False]])
    found = best_path(A, B, none, none.T)
    assert (A.flatten()[found["lora_A"]], B.flatten()[found["lora_B"]]) == (-4, -3)  # 4·3 > 5·2 > 9·0.5
    found = best_path(A / 100, B / 100, first, none.T)
    assert (A.flatten()[found["lora_A"]], B.flatten()[found["lora_B"]]) == (5, -2)
    for pruned_A, pruned_B, fresh_A, fresh_B in ((first, none.T, A, 0 * B), (none, first.T, 0 * A, B)):
        found = best_path(fresh_A, fresh_B, pruned_A, pruned_B)
        assert (found["lora_A"] // 2).tolist() == (found["lora_B"] % 3).tolist() == [1]  # ties, and rank 0 is gone


# --- what they are worth ---------------------------------------------------------------------------------------------


def test_the_report_of_one_small_layer():
    layer = layer_of([[1, 0, 2], [0, 0, 0]], [[1, 3], [0, 0]])
    with torch.no_grad():
        layer.base_layer.weight[0, 0] = -8  # the scale is 8: this entry of the merged weight is zero
    report = json.loads(json.dumps(sparsity_report(nn.Sequential(layer))))
    assert report["entries"] == {"A": 6, "B": 4, "BA": 6, "merged": 6}
    assert report["nonzero"] == {"A": 2, "B": 2, "BA": 2, "merged": 5}
    assert report["bytes"] == {"dense": 40, "packed": (1 + 8) + (1 + 8), "compacted": 1 * (3 + 2) * 4}
    zeros = {"A": pytest.approx(2 / 3), "B": 0.5, "BA": pytest.approx(2 / 3), "merged": pytest.approx(1 / 6)}
    assert report["zeros"] == zeros
    ranks = {"effective_rank": pytest.approx(1), "numerical_rank": 1}
    assert report == report | ranks and report["layers"] == {"0": zeros | ranks}


@pytest.mark.parametrize(("second", "rank"), [(1e-5, 1), (1e-3, 2)])
@pytest.mark.parametrize(("inputs", "outputs"), [(1000, 10), (10, 1000)])
def test_a_singular_value_counts_above_what_rounding_may_make(inputs, outputs, second, rank):
    layer = layer_of(torch.eye(2, inputs).tolist(), (torch.eye(outputs, 2) * torch.tensor([1, second])).tolist())
    report = sparsity_report(nn.Sequential(layer))  # 1000 · 2⁻²³ is 1.2e-4
    assert report["numerical_rank"] == rank


def test_the_zero_update_has_no_rank():
    report = sparsity_report(nn.Sequential(layer_of([[1, 2], [3, 4]], [[0, 0], [0, 0]])))
    assert (report["numerical_rank"], report["effective_rank"], report["zeros"]["BA"]) == (0, 0, 1)


# --- the sparsifier --------------------------------------------------------------------------------------------------


def still(built, **options):
    """An optimizer that moves nothing, after a backward that found zeros."""
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return torch.optim.SGD([p for p in built.parameters() if p.requires_grad], **{"lr": 0.1} | options)


@pytest.mark.parametrize(
    ("rank", "settings"),
    [
        (8, {"kind": "structured", "sparsity": 1 / 8}),
        (8, {"kind": "structured", "sparsity": 7 / 8}),
        (1, {"sparsity": 0.0}),
        (1, {"kind": "l1", "sparsity": 0.99, "l1": 0.1}),  # a fixed λ aims at no share
    ],
)
def test_the_least_and_the_most_that_may_go(model, rank, settings):
    built = model(rank=rank)
    sparsifier = Sparsifier(built, runs.zeros(**settings | {"start": 0.0}))
    if settings["sparsity"] == 0:
        sparsifier.after_step(1.0, still(built))
        assert not sparsifier.pruned


@pytest.mark.parametrize(("kind", "share"), [("magnitude", 0.5), ("structured", 0.0)])
def test_the_zeros_of_a_fresh_b_are_entries_and_no_ranks(model, kind, share):
    built = model(target_modules=["query"])  # A and B are of one size
    assert Sparsifier(built, runs.zeros(kind)).reached() == share


def test_a_step_that_the_gradient_scaler_skipped_prunes_nothing(moved):
    built = moved()
    sparsifier, optimizer = Sparsifier(built, runs.zeros()), still(built)
    optimizer.step_was_skipped = True
    sparsifier.after_step(1.0, optimizer)
    assert sparsifier.reached() == 0 and not sparsifier.pruned
    optimizer.step_was_skipped = False
    sparsifier.after_step(1.0, optimizer)
    assert sparsifier.reached() == pytest.approx(0.5, abs=0.01)


def test_only_what_was_stepped_is_shrunk(moved):
    built = moved()
    layers = list(adapter_layers(built).values())
    resting, outside, slow, *others = (list(layer.adapter_parameters().values()) for layer in layers)
    optimizer = still(built)
    for parameter in resting:
        parameter.grad = None
    (group,) = optimizer.param_groups
    group["params"] = [p for p in group["params"] if not any(p is other for other in (*outside, *slow))]
    optimizer.add_param_group({"params": slow, "lr": 0.0})
    before = {p: p.detach().clone() for layer in layers for p in layer.adapter_parameters().values()}
    sparsifier = Sparsifier(built, runs.zeros("l1", l1=0.7))
    sparsifier.after_step(0.5, optimizer)
    assert all(torch.equal(p, before[p]) for p in (*resting, *outside, *slow))
    shrunk = nn.functional.softshrink
    assert all(torch.allclose(p, shrunk(before[p], 0.07), atol=1e-7) for own in others for p in own)
    assert sparsifier.penalty == pytest.approx(0.7)


def test_moments_of_another_type_or_shape_are_left(moved):
    built = moved()
    sparsifier, optimizer = Sparsifier(built, runs.zeros()), still(built)
    kept = {}
    for _, parameter in sparsifier._factors():
        eight_bit = torch.ones(parameter.shape, dtype=torch.uint8)
        optimizer.state[parameter] = {
            "state1": eight_bit,
            "absmax": torch.ones(3),
            "exp_avg": torch.ones_like(parameter),
        }
        kept[parameter] = optimizer.state[parameter]
    sparsifier.after_step(1.0, optimizer)
    for name, parameter in sparsifier._factors():
        states = kept[parameter]
        assert states["state1"].all() and states["absmax"].all()
        assert torch.equal(states["exp_avg"] == 0, sparsifier.pruned[name])
