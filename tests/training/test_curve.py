"""What a run has cost, and its curve, in exact numbers of small cases."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorakit.training import Budget, Ledger, Schedule
from lorakit.training.state import Curve

MANY = 2**24 + 1  # is no float32
NOTHING = {"steps": 0, "accepted_steps": 0, "examples": 0, "tokens": 0, "tokens_backpropagated": 0}
NOTHING |= {"flops_forward": 0.0, "flops_backward": 0.0, "flops_gate": 0.0, "steps_without_labels": 0, "seconds": 0.0}
NOTHING |= {"loss_sum": 0.0, "loss_steps": 0, "score_sum": 0.0, "score_count": 0}


@pytest.fixture
def clock(monkeypatch):
    now = [2.5]
    monkeypatch.setattr("lorakit.training.costs.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def alone(vector):
    """The sum over one process."""
    return vector


def test_a_ledger_adds_up_what_all_processes_did(clock):
    ledger = Ledger()
    assert ledger.take_means() == (None, None)
    assert json.dumps(ledger.state_dict()) == json.dumps(NOTHING)
    ledger.add(examples=9, score=9.0, scored=9)
    ledger.forget()
    for tokens in (MANY, 4):
        ledger.add(examples=2, tokens=tokens, tokens_backpropagated=3, loss=1.5)
    ledger.add(flops_forward=5.0, flops_backward=7.0, flops_gate=11.0, accepted=1, without_labels=1)
    ledger.add(score=0.5, scored=1)
    ledger.commit(lambda vector: 2 * vector)  # as two processes would
    expected = NOTHING | {"steps": 1, "accepted_steps": 1, "examples": 8, "tokens": 2 * (MANY + 4)}
    expected |= {"tokens_backpropagated": 12, "flops_forward": 10.0, "flops_backward": 14.0, "flops_gate": 22.0}
    expected |= {"seconds": 2.5, "loss_sum": 3.0, "loss_steps": 1, "score_sum": 0.5, "score_count": 1}
    assert json.dumps(ledger.state_dict()) == json.dumps(expected) and ledger.flops == 46.0
    clock[0] = 4.0
    ledger.restart_clock()
    clock[0] = 4.25
    ledger.commit(alone)  # rejected
    assert (ledger.steps, ledger.accepted_steps, ledger.steps_without_labels, ledger.seconds) == (2, 1, 0, 2.75)
    ledger.add(without_labels=1, loss=1.0)
    ledger.commit(alone)
    assert (ledger.accepted_steps, ledger.steps_without_labels, ledger.score_count) == (1, 1, 1)
    assert ledger.take_means() == (pytest.approx(4 / 3), 0.5)
    assert ledger.take_means() == (None, None)
    ledger.add(loss=2.0, score=3.0, scored=1, accepted=1)
    ledger.commit(alone)
    assert ledger.take_means() == (2.0, 3.0) and ledger.accepted_steps == 2
    restored = Ledger()
    restored.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert restored.state_dict() == ledger.state_dict()


def test_shares_and_factors():
    assert Budget(1).share(Ledger(accepted_steps=3, steps=4)) == 3.0
    assert Budget(8, "flops").share(Ledger(flops_forward=1.0, flops_gate=3.0)) == 0.5
    shares = (0.0, 0.1, 0.2, 0.6, 1.0, 1.2)
    ways = {
        "linear": [0.1, 0.55, 1, 0.5, 0, 0],
        "constant": [0.1, 0.55, 1, 1, 1, 1],
        "cosine": [0.1, 0.55, 1, 0.5, 0, 0],
    }
    for name, expected in ways.items():
        found = [Schedule(name, warmup=0.2).factor(share) for share in shares]
        assert found == pytest.approx(expected, abs=1e-12)
    assert Schedule("cosine", 0.2).factor(0.4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert Schedule().factor(0.25) == 0.75


def evaluated(losses, keep_best):
    """A curve of a model whose only weight is the step's number, and that model."""
    curve, model, ledger = Curve(keep_best), nn.Linear(1, 1, bias=False), Ledger()
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    for ledger.steps, loss in enumerate(losses, 1):
        model.weight.data.fill_(ledger.steps)
        curve.add(ledger, 0.1, 1.0)
        if loss is not None:
            curve.add_validation({"loss": loss}, model)
    return curve, model


def test_a_point_holds_where_the_run_stands():
    ledger = Ledger(
        steps=5, accepted_steps=4, tokens=30, tokens_backpropagated=20, flops_forward=1.0, flops_backward=2.0,
        flops_gate=4.0, seconds=1.23456, loss_sum=3.0, loss_steps=2, score_sum=1.0, score_count=4,
    )  # fmt: skip
    curve = Curve()
    curve.add(ledger, 0.01, 0.75)
    counts = {"step": 5, "accepted_steps": 4, "tokens": 30, "tokens_backpropagated": 20, "flops": 7.0, "seconds": 1.235}
    measured = {"learning_rate": 0.01, "train_loss": 1.5, "gate_score": 0.25, "acceptance_rate": 0.75}
    assert curve.points[0].model_dump() == counts | measured | {"validation": None}
    curve.add(ledger, None, 0.5)
    assert (curve.points[1].train_loss, curve.points[1].gate_score, curve.points[1].learning_rate) == (None, None, None)


@pytest.mark.parametrize(
    ("losses", "best", "last"),
    [([3.0, 1.0, 2.0], 2, 3), ([1.0, None, 2.0, None], 1, 3), ([2.0, 1.0, 1.0, 5.0], 3, 4), ([None], None, None)],
)
def test_the_best_is_the_last_of_the_lowest(losses, best, last):
    curve, model = evaluated(losses, keep_best=True)
    assert curve.best_step == best and set(curve.best) == ({"weight"} if best else set())
    assert (curve.chosen() and curve.chosen().step) == best
    again = Curve(keep_best=True)
    again.load_state_dict(json.loads(json.dumps(curve.state_dict())))
    assert again.points == curve.points and again.best_step == best
    curve.restore_best(model)
    assert model.weight.item() == (best or len(losses)) and model.frozen.item() == 1
    curve, model = evaluated(losses, keep_best=False)
    assert (curve.best, curve.best_step) == ({}, None)
    assert (curve.chosen() and curve.chosen().step) == last
