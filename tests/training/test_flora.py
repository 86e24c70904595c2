"""Training on chosen tokens: denominators, logs, costs, resume, and a batch gate before the tokens' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from flora_runs import MODES, arguments, budgeted, decoder, flora, ledger, modes

from lorakit.errors import ParameterError, require_finite
from lorakit.gates import build_gate
from lorakit.training import Diverged, FLoRATrainer


def losses(run) -> list[float]:
    """What was logged of the training loss."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


# everything is the plain trainer ---------------------------------------------------------------------


@modes
def test_every_token_is_bitwise_the_plain_trainer(tmp_path, mode):
    ours = runs.ran(flora(decoder(), tmp_path / "a", {"topk_tokens": 1.0, "mode": mode}))
    plain = runs.ran(runs.plain(decoder(), arguments(tmp_path / "b"), language=True))
    assert runs.equal(runs.weights(ours.model), runs.weights(plain.model))
    assert losses(ours) == losses(plain)


@modes
def test_nearly_every_token_is_the_plain_trainer_but_for_rounding(tmp_path, mode):
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "gradient_accumulation_steps": 2}
    rows = runs.language_rows().map(lambda row: {"labels": row["input_ids"]})  # a prompt's tokens would not be chosen
    ours, plain = (
        runs.ran(flora(decoder(), tmp_path / str(share), {"topk_tokens": share, "mode": mode}, data=rows, **sgd))
        for share in (0.9999, 1.0)
    )
    moved = False
    for a, b, before in zip(*(runs.weights(m) for m in (ours.model, plain.model, decoder())), strict=True):
        assert (a - b).norm() <= 1e-4 * (b - before).norm() + 1e-7
        moved |= not torch.equal(b, before)
    assert moved


def test_baseline_is_the_default(tmp_path):
    run = FLoRATrainer(decoder(), arguments(tmp_path))
    assert not run.tokens.selective


# denominators ---------------------------------------------------------------------------------------


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.5}


@pytest.mark.parametrize(
    ("mode", "settings"), [("gather", {"score": "loss"}), ("fractional", {"score": "sketch", "sketch_dim": 64})]
)
def test_micro_batches_of_one_window_give_the_step_of_one_batch(tmp_path, mode, settings):
    moved = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = decoder()
        before = runs.weights(model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        flora(model, tmp_path, settings | {"per": "sequence", "mode": mode}, **SGD | options).train()
        moved.append(torch.cat([(a - b).flatten() for a, b in zip(runs.weights(model), before, strict=True)]))
    assert moved[0].norm() > 0.01
    for other in moved[1:]:
        assert (other - moved[0]).norm() < 1e-4 * moved[0].norm()


DRAWN = {"policy": "pps", "score": "loss"}
CHOICES = [{"method": "random"}, {"score": "loss"}, DRAWN, DRAWN | {"per": "sequence"}]


@pytest.mark.parametrize("settings", CHOICES, ids=lambda settings: "-".join(settings.values()))
def test_a_step_is_the_chosen_losses_over_all_that_the_window_chose(tmp_path, settings):
    """The oracle is the model's own losses, each chosen one with its weight, over chosen (sampled: over all) tokens."""
    model, oracle = decoder(), decoder()
    run = flora(model, tmp_path, settings, max_steps=1, gradient_accumulation_steps=3, **SGD)
    seen, choose, select = [], run.tokens.choose, run.tokens.select
    run.tokens.choose = lambda *given: (seen.append([choose(*given)]), seen[-1][0])[1]
    run.tokens.select = lambda m, inputs, labels, look: (
        select(m, inputs, labels, look),
        seen[-1].extend([inputs, labels]),
    )[0]
    run.train()
    assert len(seen) == 3
    total = sum(chosen.predictions if chosen.weights is not None else len(chosen.where) for chosen, *_ in seen)
    assert len({len(chosen.where) for chosen, *_ in seen}) > 1 or settings.get("policy") == "pps"
    for chosen, inputs, labels in seen:
        logits = oracle(**inputs).logits.flatten(0, 1)[chosen.where]
        words = labels.flatten()[chosen.where + 1]
        losses = F.cross_entropy(logits, words, reduction="none")
        weights = torch.ones(len(words)) if chosen.weights is None else chosen.weights
        ((losses * weights).sum() / total).backward()
    for ours, expected in zip(model.parameters(), oracle.parameters(), strict=True):
        if expected.requires_grad:
            step = 0.5 * expected.grad
            assert (ours - (expected - step)).norm() < 1e-4 * step.norm() + 1e-7


# logs and costs -------------------------------------------------------------------------------------


STILL = {"learning_rate": 1e-30, "max_steps": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("mode", "gate", "policy"),
    [("gather", None, "topk"), ("fractional", None, "pps"),
     ("gather", runs.Alternating, "pps"), ("fractional", runs.Closed, "topk")],
)  # fmt: skip
def test_the_loss_logged_is_the_mean_over_all_labels(tmp_path, mode, gate, policy):
    told = {"average_tokens_across_devices": policy == "pps"}  # alike for one process
    chosen = flora(decoder(), tmp_path / "a", {"mode": mode, "policy": policy}, gate=gate and gate(), **STILL | told)
    plain = flora(decoder(), tmp_path / "b", {"method": "baseline"}, **STILL)
    expected = losses(runs.ran(plain))
    assert losses(runs.ran(chosen)) == pytest.approx(expected, rel=1e-4) and len(expected) == 4


def test_the_curves_training_loss_is_the_mean_over_all_labels(tmp_path):
    found = []
    for name, gating in (("a", {"mode": "fractional"}), ("b", {"method": "baseline"})):
        still = {"params": {"learning_rate": 1e-30}, "evaluations": 3}
        run = runs.ran(budgeted(decoder(), tmp_path / name, gating, **still))
        found.append([point.train_loss for point in run.curve.points])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"method": "random"}])
def test_costs_of_both_modes(tmp_path, settings):
    gatings = {mode: settings | {"mode": mode} for mode in MODES} | {"none": {"method": "baseline"}}
    made = {mode: runs.ran(budgeted(decoder(), tmp_path / mode, gating)) for mode, gating in gatings.items()}
    gather, fractional, plain = (run.ledger for run in made.values())
    seen = made["fractional"].tokens.seen
    assert gather.tokens == fractional.tokens == plain.tokens > seen["predictions"] > 0
    assert gather.tokens_backpropagated == plain.tokens_backpropagated == plain.tokens
    assert fractional.tokens_backpropagated == seen["chosen"]
    assert made["gather"].tokens.seen == seen and 0.28 < seen["chosen"] / seen["predictions"] < 0.32
    assert fractional.flops_backward < 0.4 * plain.flops_backward
    assert 0.8 * plain.flops_backward < gather.flops_backward < plain.flops_backward
    assert plain.flops_forward < fractional.flops_forward < 1.5 * plain.flops_forward
    assert (fractional.flops_gate > 0) == (settings == {}) and plain.flops_gate == 0


def test_evaluation_is_the_trainers(tmp_path):
    for made in (flora, budgeted):
        model = decoder()
        made(model, tmp_path / "a", {"mode": "fractional"}).train()
        gatings = {"b": {"mode": "fractional"}, "c": {"method": "baseline"}}
        one, other = (made(model, tmp_path / name, gating).evaluate()["eval_loss"] for name, gating in gatings.items())
        assert one == pytest.approx(other, rel=1e-7) and one > 0  # sums in another order


def test_evaluating_often_changes_nothing(tmp_path):
    gating = {"mode": "fractional", "policy": "pps"}
    often = runs.ran(flora(decoder(), tmp_path / "a", gating, eval_strategy="steps", eval_steps=3))
    never = runs.ran(flora(decoder(), tmp_path / "b", gating))
    assert runs.equal(runs.weights(often.model), runs.weights(never.model))
    assert ledger(often) == ledger(never) and often.tokens.state_dict() == never.tokens.state_dict()


# batches without labels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "method", "gate"),
    [("gather", "random", "none"), ("fractional", "random", "none"), ("fractional", "flora", "none"),
     ("gather", "random", "novelty"), ("fractional", "flora", "novelty"), ("fractional", "random", "random")],
)  # fmt: skip
def test_batches_without_a_label_are_skipped_and_counted(tmp_path, mode, method, gate):
    model = decoder()
    made = build_gate(runs.batch_gate(gate, rate=0.9, burn_in=3, m=64, k=8), model, "causal")
    settings = {"method": method, "mode": mode}
    options = {"params": {"gradient_accumulation": 1}, "data": runs.half_empty(), "gate": made, "budget": 8}
    run = budgeted(model, tmp_path, settings, **options)
    run.args.train_sampling_strategy = "sequential"
    run.train()
    assert run.ledger.steps == 8 and run.ledger.steps_without_labels == 4
    assert run.ledger.accepted_steps == (4 if gate == "none" else sum(run.gate_log.decisions))
    assert gate == "none" or len(run.gate_log.decisions) == 4


@modes
def test_a_micro_batch_without_a_label_weighs_nothing(tmp_path, mode):
    """Two micro-batches, one of them empty, step as the other does alone."""
    rows = runs.half_empty()
    settings = {"mode": mode, "score": "loss", "per": "sequence"}
    options = SGD | {"max_steps": 1, "train_sampling_strategy": "sequential"}
    options["gate"] = runs.Open() if mode == "fractional" else None
    both = runs.ran(flora(decoder(), tmp_path / "a", settings, data=rows, gradient_accumulation_steps=2, **options))
    alone = runs.ran(flora(decoder(), tmp_path / "b", settings, data=rows.select(range(8, 16)), **options))
    for a, b in zip(runs.weights(both.model), runs.weights(alone.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert both.ledger.flops_backward == alone.ledger.flops_backward > 0


@pytest.mark.parametrize("gate", [None, runs.Open()], ids=["ungated", "gated"])
@pytest.mark.parametrize(("name", "raised"), [("logits", Diverged), ("hidden", ParameterError)])
def test_only_logits_that_are_no_numbers_are_a_loss_that_is_none(tmp_path, monkeypatch, name, raised, gate):
    def refuse(*_):
        raise ParameterError(name, "nan", "must be finite")

    run = budgeted(decoder(), tmp_path, gate=gate)
    run.tokens.verify = lambda *_: None
    monkeypatch.setattr(run.tokens, "select", refuse)
    with pytest.raises(raised, match="training loss is nan at step 1" if name == "logits" else "hidden='nan'"):
        run.train()


def test_what_is_not_finite_before_there_is_a_loss_ends_the_run_as_diverged(tmp_path, monkeypatch):
    run = budgeted(decoder(), tmp_path)
    run.tokens.verify = lambda *_: None
    monkeypatch.setattr(run.tokens, "select", lambda *_: require_finite(False, "hidden", "nan"))
    with pytest.raises(Diverged, match="^hidden='nan'.* at step 1$"):
        run.train()


@pytest.mark.parametrize("seed", [3, 4])
def test_the_runs_seed_is_the_selections(tmp_path, seed):
    shares = flora(decoder(), tmp_path, {"method": "random"}, seed=seed).tokens.shares
    assert (shares.seed, shares.rank) == (seed, 0)
