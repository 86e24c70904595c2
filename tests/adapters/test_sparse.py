"""Sparse LoRA: prox and masks against closed forms, zeros that stay, ranks gone without a trace, smaller files."""

from __future__ import annotations

import json
import math

import pytest
import sparse_models
import torch
import training_runs as runs
from sparse_models import batch, pruned
from torch import nn
from training_runs import Alternating, Closed, equal, kill, trainer, weights

from lorakit.adapters import adapter_layers, attach, sparsity_report
from lorakit.adapters.sparse import FACTORS, has_path, prox, prune_smallest
from lorakit.adapters.sparsify import Sparsifier, due
from lorakit.errors import LorakitError, ParameterError
from lorakit.training import Budget, checkpoint

model = sparse_models.model
moved = sparse_models.moved

KINDS = ("magnitude", "l1", "structured")


def train(built, sparsifier, steps, optimizer, begin=0.0):
    """`steps` steps from the share `begin` to 1; yields after each."""
    sparsifier.begin()
    for step in range(steps):
        built.train()(**batch(step)).loss.backward()
        nn.utils.clip_grad_norm_(built.parameters(), 1.0)
        optimizer.step()
        sparsifier.after_step(begin + (1 - begin) * (step + 1) / steps, optimizer)
        yield step
        optimizer.zero_grad()


def adamw(built, **options):
    trained = [p for p in built.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, **{"lr": 1e-2, "weight_decay": 0.1} | options)


def sgd(built, **options):
    return torch.optim.SGD([p for p in built.parameters() if p.requires_grad], **{"lr": 0.1, "momentum": 0.9} | options)


# --- the proximal step -----------------------------------------------------------------------------------------------


def test_prox_is_the_closed_form_and_the_minimum_its_zeros_without_a_sign():
    points = torch.linspace(-2, 2, 41, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    for threshold in (0.0, 0.3, 1.05):
        objective = 0.5 * (grid[None] - points[:, None]) ** 2 + threshold * grid.abs()
        assert torch.allclose(prox(points, threshold), grid[objective.argmin(1)], atol=1e-4)
        closed = torch.nn.functional.softshrink(points, threshold)
        assert torch.allclose(prox(points, threshold), closed, atol=1e-15)
    shrunk = prox(torch.tensor([-0.5, 0.5, -0.0, -2.0]), 1.0)
    assert shrunk.tolist() == [0, 0, 0, -1] and not shrunk[:3].signbit().any()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_penalty_is_applied_once_a_step_times_the_learning_rate(moved, micro_batches):
    built, twin = moved(), moved()
    optimizers = [sgd(side, momentum=0, lr=torch.tensor(0.1)) for side in (built, twin)]
    sparsifier = Sparsifier(built, runs.zeros("l1", l1=0.7, start=0.1, end=1.0))
    sparsifier.begin()
    for side, optimizer in zip((built, twin), optimizers, strict=True):
        for index in range(micro_batches):
            (side.train()(**batch(index)).loss / micro_batches).backward()
        optimizer.step()
    sparsifier.after_step(0.1, optimizers[0])
    for path, layer in adapter_layers(built).items():
        for name, plain in adapter_layers(twin)[path].adapter_parameters().items():
            expected = torch.nn.functional.softshrink(plain.detach(), 0.1 * 0.7)
            assert torch.allclose(getattr(layer, name), expected, atol=1e-7)
            assert 0 < (expected == 0).sum() < expected.numel()


def test_the_penalty_found_is_the_smallest_that_zeroes_what_is_due(moved):
    built = moved()
    before = {name: p.detach().clone() for name, p in Sparsifier(built, runs.zeros("l1"))._factors()}
    sparsifier = Sparsifier(built, runs.zeros("l1", sparsity=0.4, start=0.0, end=0.5))
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    sparsifier.after_step(0.25, sgd(built))  # the optimizer itself took no step
    due = 0.4 * (1 - 0.5**3)
    for name, parameter in sparsifier._factors():
        ordered = before[name].abs().flatten().sort().values
        threshold = ordered[round(due * len(ordered)) - 1]
        assert torch.allclose(parameter, torch.nn.functional.softshrink(before[name], float(threshold)), atol=1e-7)
        assert (parameter == 0).sum() == round(due * len(ordered))
    assert not sparsifier.pruned
    sparsifier.after_step(0.5, sgd(built))  # the end, at which zeros are frozen
    assert all(torch.equal(sparsifier.pruned[name], p == 0) for name, p in sparsifier._factors())


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_schedule_has_its_end_points_and_the_cubic_between():
    settings = runs.zeros(sparsity=0.6, start=0.2, end=0.7)
    assert [due(settings, share) for share in (0, 0.1, 0.2)] == [0, 0, 0]
    assert [due(settings, share) for share in (0.7, 0.9, 1.3)] == [0.6, 0.6, 0.6]
    for share in (0.21, 0.3, 0.45, 0.69):  # Zhu & Gupta's form, with s_initial = 0
        assert due(settings, share) == pytest.approx(0.6 + (0 - 0.6) * (1 - (share - 0.2) / (0.7 - 0.2)) ** 3)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_follow_the_schedule_while_training(model, kind):
    built = model()
    sparsifier = Sparsifier(built, runs.zeros(kind, sparsity=0.5))
    tolerance = {"magnitude": 0.5 * 0.01 + 0.005, "l1": 0.005, "structured": 0.5 / 8 + 0.005}[kind]
    for step in train(built, sparsifier, 40, adamw(built)):
        sparsifier.at_point(step + 1)
    assert len(sparsifier.history) == 40
    assert all(abs(target - reached) <= tolerance for _, target, reached in sparsifier.history)
    assert sparsifier.history[-1] == [40, 0.5, pytest.approx(0.5, abs=0.03)]


def test_masks_are_chosen_anew_only_when_the_target_has_risen_enough(model, monkeypatch):
    built, asked = model(), []
    sparsifier = Sparsifier(built, runs.zeros(sparsity=0.5, start=0.0, end=0.9))
    prune = sparsifier.prune_to
    monkeypatch.setattr(sparsifier, "prune_to", lambda target: (asked.append(target), prune(target)))
    optimizer = sgd(built)
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for step in range(1, 1001):
        sparsifier.after_step(step / 1000, optimizer)
    rises = [b - a for a, b in zip([0, *asked], asked, strict=False)]
    assert asked[-1] == 0.5 and 50 < len(asked) <= 101
    assert all(0.005 <= rise < 0.0067 for rise in rises[:-1])  # a step raises the target by 0.00167 at most


# --- masks -----------------------------------------------------------------------------------------------------------


def test_smallest_are_pruned_exactly_as_many_as_asked_and_stay_so():
    scores = torch.rand(12, 7, generator=torch.Generator().manual_seed(0))
    first = prune_smallest(scores, torch.zeros(12, 7, dtype=torch.bool), 20)
    assert torch.equal(first, scores <= scores.flatten().sort().values[19])
    second = prune_smallest(1 - scores, first, 50)  # the ranking turned round
    assert second.sum() == 50 and (second | ~first).all()
    rest = (1 - scores)[~first].sort().values
    assert torch.equal(second & ~first, ~first & (1 - scores <= rest[29]))


def test_structured_prunes_the_weakest_ranks_of_each_layer(moved):
    built = moved()
    expected = {
        path: sorted(range(8), key=lambda k, la=layer: float((la.lora_B[:, [k]] @ la.lora_A[[k]]).detach().norm()))[:3]
        for path, layer in adapter_layers(built).items()
    }
    pruned(built, 3 / 8, kind="structured")
    for path, layer in adapter_layers(built).items():
        gone = [k for k in range(8) if not layer.lora_A[k].any() and not layer.lora_B[:, k].any()]
        assert gone == sorted(expected[path])
        assert torch.count_nonzero(layer.lora_A) == 5 * layer.in_features


@pytest.mark.parametrize("factors", ["A", "B"])
@pytest.mark.parametrize("kind", ["magnitude", "l1"])
def test_one_factor_alone_is_made_sparse(model, kind, factors):
    built = model()
    sparsifier = Sparsifier(built, runs.zeros(kind, 0.5, factors))
    list(train(built, sparsifier, 15, adamw(built)))
    report = sparsity_report(built)["zeros"]
    other = {"A": "B", "B": "A"}[factors]
    assert report[factors] == pytest.approx(0.5, abs=0.01) and report[other] == 0


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_persist_in_weights_and_moments(model, kind, optimizer):
    built = model()
    stepper = optimizer(built)
    sparsifier = Sparsifier(built, runs.zeros(kind, sparsity=0.6, start=0.05, end=0.2))
    seen, frozen = {}, None
    for step in train(built, sparsifier, 125, stepper):
        for name, mask in sparsifier.pruned.items():
            assert (mask | ~seen.get(name, mask)).all()  # monotone
        seen = dict(sparsifier.pruned)
        if step == 24:  # the end of the schedule: 100 more steps
            frozen = {name: parameter == 0 for name, parameter in sparsifier._factors()}
            before = weights(built)
    assert not equal(before, weights(built))  # training went on
    for name, parameter in sparsifier._factors():
        assert torch.equal(seen[name], frozen[name]) and torch.equal(frozen[name], parameter == 0)
        states = [state for state in stepper.state[parameter].values() if state.shape == parameter.shape]
        assert len(states) == {adamw: 2, sgd: 1}[optimizer]
        for state in states:
            assert state[frozen[name]].abs().max() == 0 and state[~frozen[name]].abs().sum() > 0
    assert sparsifier.reached() == pytest.approx(0.6, abs=0.03)


def test_clipping_does_not_see_pruned_entries(moved):
    built, twin = pruned(moved(), 0.5), pruned(moved(), 0.5)
    sparsifier = Sparsifier(built, runs.zeros(sparsity=0.5))
    sparsifier.prune_to(0.5)
    sparsifier.begin()
    for side in (built, twin):
        side.train()(**batch()).loss.backward()
    for (name, own), (_, plain) in zip(sparsifier._factors(), Sparsifier(twin, runs.zeros())._factors(), strict=True):
        mask = sparsifier.pruned[name]
        assert plain.grad[mask].abs().sum() > 0  # without the hook they would be there
        assert own.grad[mask].abs().max() == 0 and torch.equal(own.grad[~mask], plain.grad[~mask])
    sparsifier.end()
    sparsifier.end()
    built.zero_grad()
    built(**batch()).loss.backward()
    for own, plain in zip(built.parameters(), twin.parameters(), strict=True):
        assert own.grad is None or torch.equal(own.grad, plain.grad)


# --- never to nothing ------------------------------------------------------------------------------------------------


def alive(layer):
    return bool(has_path(layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("fresh", [True, False])
def test_the_sparsest_pruning_leaves_every_layer_a_rank(model, moved, fresh):
    built = model() if fresh else moved()
    with torch.no_grad():  # the largest entries of A and B are of different ranks
        for layer in adapter_layers(built).values():
            layer.lora_A[0, :3] += 10
            layer.lora_B[:3, 5] += 0 if fresh else 10
    sparsifier = Sparsifier(built, runs.zeros(sparsity=0.99, start=0.0, end=0.5))
    sparsifier.prune_to(0.99)
    for path in adapter_layers(built):
        A, B = (~sparsifier.pruned[f"{path}.{name}"] for name in ("lora_A", "lora_B"))
        assert (A.any(1) & B.any(0)).any()
        for kept in (A, B):  # all of a fresh B's scores are equal: ties are pruned by number
            assert kept.sum() == kept.numel() - round(0.99 * kept.numel())
    list(train(built, sparsifier, 5, adamw(built), begin=0.5))
    assert all(alive(layer) for layer in adapter_layers(built).values())


@pytest.mark.parametrize("factors", ["both", "A", "B"])
def test_a_penalty_beyond_all_bounds_leaves_every_layer_a_rank(model, factors):
    built = model()
    sparsifier = Sparsifier(built, runs.zeros("l1", factors=factors, l1=1e6))
    list(train(built, sparsifier, 20, adamw(built)))
    for layer in adapter_layers(built).values():
        assert alive(layer)
        assert all(torch.count_nonzero(getattr(layer, name)) == 1 for name in FACTORS[factors])
    assert sparsifier.reached() > 0.98


def test_what_a_layer_gets_back_are_the_entries_of_its_strongest_rank(moved):
    built = moved()
    sparsifier, optimizer = Sparsifier(built, runs.zeros("l1", l1=1e6)), adamw(built)
    sparsifier.begin()
    built.train()(**batch(0)).loss.backward()
    optimizer.step()
    factors = [(la.lora_A.detach().clone(), la.lora_B.detach().clone()) for la in adapter_layers(built).values()]
    sparsifier.after_step(0.5, optimizer)
    for layer, (A, B) in zip(adapter_layers(built).values(), factors, strict=True):
        rank = int((A.abs().amax(1) * B.abs().amax(0)).argmax())
        assert layer.lora_A.count_nonzero() == layer.lora_B.count_nonzero() == 1
        assert layer.lora_A.abs().max() == A[rank].abs().max() and layer.lora_B.abs().max() == B[:, rank].abs().max()


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"rank": 1}, {"kind": "structured"}, "sparsity=0.5: prunes none of the 1 ranks of bert"),
        ({"rank": 8}, {"kind": "structured", "sparsity": 0.95}, "sparsity=0.95: prunes all of the 8 ranks of bert"),
        ({"rank": 8}, {"kind": "structured", "sparsity": 0.05}, "sparsity=0.05: prunes none of the 8 ranks of bert"),
        ({"rank": 1}, {"sparsity": 0.99}, r"sparsity=0.99: prunes all of the 32 entries of bert\.\S+\.lora_A"),
        ({"rank": 1}, {"sparsity": 0.99, "factors": "B", "kind": "l1"}, r"prunes all of the 32 entries of .*\.lora_B"),
    ],
)
def test_pruning_to_nothing_is_refused(model, options, settings, message):
    with pytest.raises(ParameterError, match=message):
        Sparsifier(model(**options), runs.zeros(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kind": "l0"}, "sparsify='l0'.*'magnitude', 'l1' or 'structured'"),
     ({"sparsity": 1.0}, r"sparsity=1.0: Input should be less than 1"), ({"sparsity": -0.1}, "sparsity=-0.1"),
     ({"sparsity": math.nan}, "sparsity=nan"), ({"sparsity": "0.5"}, "sparsity='0.5'"),
     ({"factors": "C"}, "sparse_factors='C'.*'both', 'A' or 'B'"),
     ({"kind": "structured", "factors": "A"}, "sparse_factors='A'.*must be 'both'"),
     ({"start": 1.0}, "prune_start=1.0"), ({"start": 0.5, "end": 0.4}, "prune_end=0.4"),
     ({"start": 0.5, "end": 0.5}, "prune_end=0.5: must be after prune_start=0.5"), ({"end": 1.1}, "prune_end=1.1"),
     ({"kind": "l1", "l1": -1.0}, "l1=-1.0"), ({"l1": 0.1}, "l1=0.1: is for sparsify 'l1', not 'magnitude'")],
)  # fmt: skip
def test_bad_settings_are_named_as_the_parameters_are(settings, message):
    with pytest.raises(ParameterError, match=message):
        runs.zeros(**settings)


def test_sparsity_needs_lora(tiny_bert):
    for built in (tiny_bert(), attach(tiny_bert(), "head"), attach(tiny_bert(), "hira")):
        with pytest.raises(LorakitError, match="has no LoRA layers"):
            Sparsifier(built, runs.zeros())


# --- in the trainer --------------------------------------------------------------------------------------------------


def run(built, folder, kind, budget=20, params=None, settings=None, **options):
    sparsifier = Sparsifier(built, runs.zeros(**{"kind": kind} | (settings or {})))
    made = trainer(built, folder, budget=Budget(budget, "steps"), params=params, controllers=[sparsifier], **options)
    return made, sparsifier


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(model, tmp_path, kind):
    params = {"weight_decay": 0.1, "max_grad_norm": 0.05}  # always clipped: a gradient that comes back is seen by all
    options = {"save_steps": 4, "evaluations": 2, "gate": Alternating(), "params": params}
    whole, first = run(model(), tmp_path / "whole", kind, **options)
    whole.train()
    killed, _ = run(model(), tmp_path / "killed", kind, **options | {"gate": Alternating()})
    kill(killed, 21 if kind != "l1" else 35)  # amid the schedule; after the freeze
    resumed, second = run(model(), tmp_path / "killed", kind, **options | {"gate": Alternating()})
    resumed.train(resume_from_checkpoint=str(checkpoint.complete(tmp_path / "killed")[-1]))
    assert equal(weights(whole.model), weights(resumed.model))
    moments = [side.optimizer.state_dict()["state"] for side in (whole, resumed)]
    assert all(equal(list(a.values()), list(b.values())) for a, b in zip(*map(dict.values, moments), strict=True))
    states = [controller.state_dict() for controller in (first, second)]
    assert all(equal(list(a.values()), list(b.values())) for a, b in [[state.pop("pruned") for state in states]])
    assert states[0] == states[1] and len(states[0]["history"]) == 20 and first.report() == second.report()


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_gives_what_the_whole_batch_gives(model, tmp_path, kind):
    params = {"optimizer": "sgd", "learning_rate": 0.1}
    made = []
    for batch_size, accumulation in ((8, 2), (4, 4)):
        changed = params | {"batch_size": batch_size, "gradient_accumulation": accumulation}
        done, sparsifier = run(model(), tmp_path / str(accumulation), kind, budget=9, params=changed)
        done.train()
        made.append((weights(done.model), sparsifier))
    (whole, first), (parts, second) = made
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))
    assert first.reached() == second.reached() > 0.4
    assert all(torch.equal(mask, first.pruned[name]) for name, mask in second.pruned.items())


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "fp32") for kind in KINDS), ("magnitude", "bf16")])
def test_it_learns_from_a_fresh_b_and_ends_sparse(model, tmp_path, kind, precision):
    params = {"precision": precision, "learning_rate": 2e-2, "gradient_accumulation": 1, "batch_size": 16}
    built = model(trainable=())  # no head trains: what is learnt is in A and B alone
    done, sparsifier = run(built, tmp_path, kind, budget=60, params=params)
    done.train()
    losses = [point.train_loss for point in done.curve.points]
    assert losses[0] > 0.67 and sum(losses[-8:]) / 8 < 0.56
    assert sparsifier.reached() == pytest.approx(0.5, abs=0.03)
    assert done.curve.points[-1].train_loss == losses[-1]
    report = json.loads(json.dumps(sparsifier.report(), allow_nan=False))
    assert (report["kind"], report["target"], report["history"][-1][1:]) == (kind, 0.5, [0.5, sparsifier.reached()])
    assert (report["l1"] > 0) == (kind == "l1")


def test_a_rejected_batch_leaves_weights_and_moments_alone(moved, tmp_path):
    before = weights(moved())
    for kind in ("magnitude", "l1"):
        done, sparsifier = run(moved(), tmp_path / kind, kind, budget=2, gate=Closed())
        done.train()
        assert equal(before, weights(done.model)) and sparsifier.reached() == 0


def test_a_fixed_penalty_is_really_applied(model):
    reached = []
    for penalty in (1e-9, 0.3, 0.8):
        built = model()
        sparsifier = Sparsifier(built, runs.zeros("l1", l1=penalty, start=0.1, end=0.9))
        list(train(built, sparsifier, 20, adamw(built)))
        reached.append(sparsifier.reached())
        assert sparsifier.report()["target"] is None and sparsifier.report()["l1"] == penalty
    assert reached[0] < 0.01 and 0.05 < reached[1] < reached[2] - 0.1
