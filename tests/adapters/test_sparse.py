"""Sparse LoRA: prox and masks against closed forms, zeros that stay, ranks gone without a trace, smaller files."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import training_runs as runs
from torch import nn
from training_runs import Alternating, Closed, equal, kill, trainer, weights

from lorakit.adapters import (
    LoRALayer,
    adapter_layers,
    attach,
    detach,
    load_adapter,
    merge,
    save_adapter,
    sparsity_report,
)
from lorakit.adapters.attachment import trained_tensors
from lorakit.adapters.packed import PACKED_FILE, pack, unpack
from lorakit.adapters.sparse import FACTORS, best_path, has_path, prox, prune_smallest, rank_scores
from lorakit.adapters.sparsify import Sparsifier
from lorakit.adapters.zeros import compact, effective_rank, singular_values
from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.training import Budget, checkpoint

KINDS = ("magnitude", "l1", "structured")


@pytest.fixture
def model(tiny_bert):
    """The same tiny BERT with Sparse LoRA, as fresh as attach leaves it."""

    def build(method="sparse", **options):
        torch.manual_seed(0)
        base = tiny_bert(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return attach(base, method, **{"rank": 8, "seed": 0} | options)

    return build


@pytest.fixture
def moved(model):
    """The same with weights as after training: no factor is zero."""

    def build(*arguments, **options):
        built = model(*arguments, **options)
        with torch.no_grad():
            for name, tensor in trained_tensors(built).items():
                generator = torch.Generator().manual_seed(len(name))
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        return built

    return build


def pruned(built, target=0.5, **settings):
    """`built`, pruned at once."""
    Sparsifier(built, runs.zeros(**settings | {"sparsity": target})).prune_to(target)
    return built


def logits(built):
    ids = torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return built.eval()(input_ids=ids).logits


def batch(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (size, 12), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2}


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


def test_prox_is_the_closed_form_and_the_minimum():
    points = torch.linspace(-2, 2, 41, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    for threshold in (0.0, 0.3, 1.05):
        objective = 0.5 * (grid[None] - points[:, None]) ** 2 + threshold * grid.abs()
        assert torch.allclose(prox(points, threshold), grid[objective.argmin(1)], atol=1e-4)
        closed = torch.nn.functional.softshrink(points, threshold)
        assert torch.allclose(prox(points, threshold), closed, atol=1e-15)


def test_prox_makes_zeros_whose_bits_are_zero():
    shrunk = prox(torch.tensor([-0.5, 0.5, -0.0, -2.0]), 1.0)
    assert shrunk.tolist() == [0, 0, 0, -1] and not shrunk[:3].signbit().any()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_penalty_is_applied_once_a_step_times_the_learning_rate(moved, micro_batches):
    built, twin = moved(), moved()
    optimizers = [sgd(built, momentum=0), sgd(twin, momentum=0)]
    sparsifier = Sparsifier(built, runs.zeros("l1", l1=0.7, start=0.0, end=1.0))
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


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_schedule_has_its_end_points_and_the_cubic_between():
    settings = runs.zeros(sparsity=0.6, start=0.2, end=0.7)
    assert [settings.target(share) for share in (0, 0.1, 0.2)] == [0, 0, 0]
    assert [settings.target(share) for share in (0.7, 0.9, 1.3)] == [0.6, 0.6, 0.6]
    for share in (0.21, 0.3, 0.45, 0.69):  # Zhu & Gupta's form, with s_initial = 0
        assert settings.target(share) == pytest.approx(0.6 + (0 - 0.6) * (1 - (share - 0.2) / (0.7 - 0.2)) ** 3)


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
    assert all(rise >= 0.005 for rise in rises[:-1])


# --- masks -----------------------------------------------------------------------------------------------------------


def test_smallest_are_pruned_exactly_as_many_as_asked_and_stay_so():
    scores = torch.rand(12, 7, generator=torch.Generator().manual_seed(0))
    first = prune_smallest(scores, torch.zeros(12, 7, dtype=torch.bool), 20)
    assert torch.equal(first, scores <= scores.flatten().sort().values[19])
    second = prune_smallest(1 - scores, first, 50)  # the ranking turned round
    assert second.sum() == 50 and (second | ~first).all()
    rest = (1 - scores)[~first].sort().values
    assert torch.equal(second & ~first, ~first & (1 - scores <= rest[29]))


def test_ties_of_a_fresh_b_are_pruned_by_number(model):
    built = pruned(model(), 0.5)
    sparsifier = Sparsifier(built, runs.zeros(sparsity=0.3, start=0.0, end=1.0))
    sparsifier.prune_to(0.3)  # B is all zeros: every score the same
    for name, parameter in sparsifier._factors():
        assert sparsifier.pruned[name].sum() == round(0.3 * parameter.numel())


def test_rank_scores_are_the_norms_of_the_terms():
    A, B = torch.randn(4, 9, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    expected = [torch.linalg.matrix_norm(B[:, [k]] @ A[[k]]) for k in range(4)]
    assert torch.allclose(rank_scores(A, B), torch.stack(expected))


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
    for path, layer in adapter_layers(built).items():
        A, B = (~sparsifier.pruned[f"{path}.{name}"] for name in ("lora_A", "lora_B"))
        assert (A.any(1) & B.any(0)).any()
        assert A.sum() == layer.lora_A.numel() - round(0.99 * layer.lora_A.numel())
    list(train(built, sparsifier, 5, adamw(built), begin=0.5))
    assert all(alive(layer) for layer in adapter_layers(built).values())


def test_best_path_is_the_strongest_shared_rank():
    A, B = torch.tensor([[3.0, -4.0], [9.0, 1.0], [2.0, 5.0]]), torch.tensor([[1.0, 0.0, -2.0], [-3.0, 0.5, 1.0]])
    none_A, none_B = torch.zeros(3, 2, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    found = best_path(A, B, none_A, none_B)
    assert (A.flatten()[found["lora_A"]], B.flatten()[found["lora_B"]]) == (-4, -3)  # 4·3 > 5·2 > 9·0.5
    found = best_path(A, B, torch.tensor([[True, True], [False, False], [False, False]]), none_B)
    assert (A.flatten()[found["lora_A"]], B.flatten()[found["lora_B"]]) == (5, -2)


@pytest.mark.parametrize("factors", ["both", "A", "B"])
def test_a_penalty_beyond_all_bounds_leaves_every_layer_a_rank(model, factors):
    built = model()
    sparsifier = Sparsifier(built, runs.zeros("l1", factors=factors, l1=1e6))
    list(train(built, sparsifier, 20, adamw(built)))
    for layer in adapter_layers(built).values():
        assert alive(layer)
        assert all(torch.count_nonzero(getattr(layer, name)) == 1 for name in FACTORS[factors])
    assert sparsifier.reached() > 0.98


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
    [
        ({"kind": "l0"}, "sparsify='l0'.*magnitude, l1, structured"),
        ({"sparsity": 1.0}, r"sparsity=1.0: must be in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": math.nan}, "sparsity=nan"),
        ({"sparsity": "0.5"}, "sparsity='0.5'"),
        ({"factors": "C"}, "sparse_factors='C'.*both, A, B"),
        ({"kind": "structured", "factors": "A"}, "sparse_factors='A'.*must be 'both'"),
        ({"start": 1.0}, "prune_start=1.0"),
        ({"start": 0.5, "end": 0.5}, "prune_end=0.5: must be after prune_start=0.5"),
        ({"start": 0.5, "end": 0.4}, "prune_end=0.4"),
        ({"end": 1.1}, "prune_end=1.1"),
        ({"kind": "l1", "l1": -1.0}, "l1=-1.0"),
        ({"l1": 0.1}, "l1=0.1: is for sparsify 'l1', not 'magnitude'"),
    ],
)
def test_bad_settings_are_named_as_the_parameters_are(settings, message):
    with pytest.raises(ParameterError, match=message):
        runs.zeros(**settings)


def test_sparsity_needs_lora(tiny_bert):
    for built in (tiny_bert(), attach(tiny_bert(), "head")):
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
    resumed.train(resume_from_checkpoint=str(checkpoint.newest(tmp_path / "killed")))
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
    for other, sparsifier in made[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(made[0][0], other, strict=True))
        assert sparsifier.reached() == made[0][1].reached() > 0.4
        assert all(torch.equal(mask, made[0][1].pruned[name]) for name, mask in sparsifier.pruned.items())


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


# --- what zeros are worth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 8])
def test_half_the_entries_zero_leave_ba_nearly_dense_and_the_merged_weight_dense(rank):
    layer = LoRALayer(nn.Linear(400, 300), attach_settings(rank))
    nn.init.normal_(layer.lora_B)
    built = pruned(nn.Sequential(layer), 0.5)
    zeros = sparsity_report(built)["zeros"]
    assert (zeros["A"], zeros["B"], zeros["merged"]) == (0.5, 0.5, 0)
    assert zeros["BA"] == pytest.approx((1 - 0.25) ** rank, abs=0.01)  # 0.32 at rank 4, 0.10 at rank 8


def attach_settings(rank):
    from lorakit.adapters import AdapterSettings

    return AdapterSettings(rank=rank)


def test_report_equals_the_dense_computation(moved):
    built = pruned(moved(), 0.8)
    layers, report = adapter_layers(built), sparsity_report(built)
    product = {path: (layer.lora_B @ layer.lora_A).detach() for path, layer in layers.items()}
    assert report["nonzero"]["BA"] == sum(int(torch.count_nonzero(BA)) for BA in product.values())
    assert report["nonzero"]["merged"] == sum(int(torch.count_nonzero(la.merged_weight())) for la in layers.values())
    for path, BA in product.items():
        sigma = torch.linalg.svdvals(BA.double())
        p = sigma[:8] / sigma[:8].sum()
        entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 1e-12)
        own = report["layers"][path]
        assert own["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-5)
        assert own["numerical_rank"] == int(torch.linalg.matrix_rank(BA))
        assert own["BA"] == pytest.approx(float((BA == 0).float().mean()), abs=1e-7)
    assert report["effective_rank"] == pytest.approx(sum(la["effective_rank"] for la in report["layers"].values()) / 7)


def test_effective_rank_of_known_spectra():
    orthogonal = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64)).Q
    assert effective_rank(singular_values(orthogonal.T, orthogonal)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(
        math.exp(0.5 * math.log(2) + 0.5 * math.log(4))
    )
    assert effective_rank(torch.zeros(4)) == 0


def test_report_reads_any_lora_merged_or_not(moved, tiny_bert):
    built = moved("lora")
    before = sparsity_report(built)
    assert before["zeros"] == {"A": 0, "B": 0, "BA": 0, "merged": 0} and before["numerical_rank"] == 8
    assert sparsity_report(merge(built)) == before
    with pytest.raises(LorakitError, match="has no LoRA layers"):
        sparsity_report(tiny_bert())


# --- compaction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_compact_removes_zero_ranks_and_changes_no_output(moved, rslora):
    built = pruned(moved(rslora=rslora), 3 / 8, kind="structured")
    before, scale = logits(built), [layer.scaling for layer in adapter_layers(built).values()]
    report = sparsity_report(built)
    assert compact(built) is built
    assert torch.allclose(logits(built), before, atol=1e-6)
    for layer, was in zip(adapter_layers(built).values(), scale, strict=True):
        assert layer.lora_A.shape == (5, layer.in_features) and layer.lora_B.shape == (layer.out_features, 5)
        settings = layer.settings
        assert layer.scaling == was == pytest.approx(settings.alpha / (math.sqrt(5) if rslora else 5))
        assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    after = sparsity_report(built)
    assert report["bytes"]["compacted"] == after["bytes"]["dense"] == after["bytes"]["compacted"]
    assert built.lorakit_attachment.settings.rank == 5
    assert compact(built) is built and torch.allclose(logits(built), before, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt2"])
def test_compacted_file_of_uneven_ranks_loads_in_peft_and_here(request, tmp_path, kind, rslora):
    from peft import PeftModel

    def base():
        torch.manual_seed(0)
        return request.getfixturevalue(kind)()

    built = attach(base(), "sparse", rank=6, alpha=10, rslora=rslora, seed=0)
    with torch.no_grad():
        for count, layer in enumerate(adapter_layers(built).values()):
            layer.lora_B.normal_()
            layer.lora_A[: count % 4] = 0  # 0 to 3 ranks go
            layer.lora_B[:, -1] *= count % 4 < 3  # and one more of B alone
    before = logits(built)
    folder = save_adapter(compact(built), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) and set(config["alpha_pattern"].values())
    for other in (load_adapter(base(), folder), PeftModel.from_pretrained(base(), folder)):
        assert torch.allclose(logits(other), before, atol=1e-5)
    ranks = {layer.settings.rank for layer in adapter_layers(built).values()}
    assert ranks == {6, 5, 4, 2}


def test_a_layer_of_zero_ranks_alone_keeps_one(model):
    built = model()
    before = logits(built)
    compact(built)
    assert {layer.settings.rank for layer in adapter_layers(built).values()} == {1}
    assert torch.equal(logits(built), before)
    built.train()(**batch()).loss.backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in adapter_layers(built).values())  # it can still learn


def test_compact_leaves_the_base_to_be_detached(moved, tiny_bert):
    torch.manual_seed(0)
    bare = tiny_bert(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    state = torch.get_rng_state()
    built = detach(compact(pruned(moved(trainable=()), 0.5, kind="structured")))
    torch.set_rng_state(state)
    assert torch.equal(logits(built), logits(bare)) and all(p.requires_grad for p in built.parameters())


def test_compact_draws_no_random_numbers(moved):
    built = moved()
    state = torch.get_rng_state()
    compact(built)
    assert torch.equal(torch.get_rng_state(), state)


def test_compact_refuses_what_it_cannot_shrink(moved, tiny_bert):
    with pytest.raises(LorakitError, match="no adapter; call attach"):
        compact(tiny_bert())
    with pytest.raises(LorakitError, match="has no LoRA layers"):
        compact(attach(tiny_bert(), "head"))
    built = merge(pruned(moved(), 0.5, kind="structured"))
    layers = adapter_layers(built)
    with pytest.raises(LorakitError, match="unmerge"):
        compact(built)
    assert adapter_layers(built) == layers


# --- packed files ----------------------------------------------------------------------------------------------------


def bits(tensor):
    return tensor.flatten().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5, 7), (16,), (1,), (), (0, 4)])
def test_packing_is_exact_to_the_bit(dtype, shape):
    tensor = (torch.randn(shape) * (torch.rand(shape) < 0.3)).to(dtype)
    if dtype.is_floating_point and tensor.numel() > 3:
        tensor.view(-1)[:3] = torch.tensor([-0.0, math.nan, math.inf])
    stored, metadata = pack({"x": tensor})
    (back,) = unpack(stored, metadata).values()
    assert back.shape == tensor.shape and back.dtype == dtype and torch.equal(bits(back), bits(tensor))


def test_packed_bits_are_where_the_format_says():
    tensor = torch.zeros(3, 6)
    tensor[0, 1], tensor[1, 2], tensor[2, 5] = 1.5, 2.5, 3.5  # entries 1, 8 and 17
    stored, metadata = pack({"x": tensor})
    assert stored["x::bitmap"].tolist() == [2, 1, 2] and stored["x::values"].tolist() == [1.5, 2.5, 3.5]
    assert json.loads(metadata["shapes"]) == {"x": [3, 6]}


def test_what_packing_would_not_shrink_is_stored_as_it_is():
    dense = torch.ones(64)
    nearly = torch.ones(64)
    nearly[:2] = 0  # 8 + 62·4 bytes = 64·4: not smaller
    assert pack({"a": dense, "b": nearly})[0].keys() == {"a", "b"}
    nearly[2] = 0
    assert "b::bitmap" in pack({"b": nearly})[0]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_packed_file_is_smaller_and_equal(tiny_bert, tmp_path, sparsity):
    def base():
        torch.manual_seed(0)
        return tiny_bert(hidden_size=128, intermediate_size=512)

    built = attach(base(), "sparse", seed=0, trainable=())
    for layer in adapter_layers(built).values():
        nn.init.normal_(layer.lora_B)
    pruned(built, sparsity)
    dense = save_adapter(built, tmp_path / "dense") / "adapter_model.safetensors"
    packed = save_adapter(built, tmp_path / "packed", packed=True) / PACKED_FILE
    assert sorted(path.name for path in packed.parent.iterdir()) == ["adapter_config.json", PACKED_FILE]
    sizes = sparsity_report(built)["bytes"]
    assert sizes["packed"] / sizes["dense"] == pytest.approx(1 - sparsity + 1 / 32, abs=1e-3)
    for file, size in ((dense, sizes["dense"]), (packed, sizes["packed"])):
        assert file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") == size
    assert packed.stat().st_size / dense.stat().st_size < 1 - sparsity + 1 / 32 + 0.06  # headers and all
    for other in (base(), attach(base(), "lora", trainable=()), attach(base(), "sparse", trainable=())):
        load_adapter(other, packed.parent)
        for path, layer in adapter_layers(built).items():
            for name, tensor in layer.adapter_parameters().items():
                assert torch.equal(bits(getattr(adapter_layers(other)[path], name).detach()), bits(tensor.detach()))
        assert torch.equal(logits(other), logits(built))


def test_packed_and_dense_replace_each_other(moved, tmp_path):
    for packed in (True, False, True):
        save_adapter(moved(), tmp_path, packed=packed)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"adapter_config.json", PACKED_FILE if packed else "adapter_model.safetensors"}


def test_head_and_full_are_not_packed(tiny_bert, tmp_path):
    with pytest.raises(ParameterError, match="packed=True: is for adapters, not 'head'"):
        save_adapter(attach(tiny_bert(), "head"), tmp_path / "head", packed=True)
    assert not (tmp_path / "head").exists()


def test_damaged_packed_files_are_refused(moved, tmp_path):
    from safetensors.torch import save_file

    folder = save_adapter(pruned(moved()), tmp_path / "adapter", packed=True)
    tensors = {f"base_model.model.{name}": t.detach() for name, t in trained_tensors(pruned(moved())).items()}
    whole, metadata = pack(tensors)
    some = next(name for name in whole if name.endswith("::values"))
    broken = {
        "lacks its bitmap": ({name: t for name, t in whole.items() if name != some}, metadata),
        "values, ": (whole | {some: whole[some][1:]}, metadata),
        "not of format": (whole, {"format": "pt"}),
    }
    target = moved()
    before = copy.deepcopy(target.state_dict())
    for message, (stored, described) in broken.items():
        save_file(stored, folder / PACKED_FILE, metadata=described)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(target, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("methods", [("lora", "sparse"), ("sparse", "lora")])
def test_lora_and_sparse_share_their_files(model, moved, tmp_path, methods):
    saved, attached = methods
    built = moved(saved)
    other = load_adapter(model(attached), save_adapter(built, tmp_path / "adapter"))
    assert torch.equal(logits(other), logits(built)) and other.lorakit_attachment.method == attached
