"""Gated training: one forward, whole windows, no trace of what was rejected, bitwise resume, PEFT and 4-bit models."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import flora_runs
import pytest
import torch
import training_runs as runs
from slora_runs import GATE, lora, slora
from torch.utils._pytree import tree_leaves

from lorakit.adapters import attach
from lorakit.errors import CheckpointError, ParameterError
from lorakit.gates import build_gate
from lorakit.gates.log import GateWarning
from lorakit.training import Budget, Diverged, checkpoint, window


def novelty(model, kind="classify"):
    settings = runs.batch_gate("novelty", rate=0.4, burn_in=4, m=64, k=8, topk=0, ema=0.1, refresh=2)
    return build_gate(settings, model, kind, seed=0)


# what a gate may not change ------------------------------------------------------------------------


def test_accepting_every_window_is_bitwise_no_gate_at_all(tmp_path):
    gates = (("a", runs.Open()), ("b", None))
    gated, plain = (runs.ran(runs.trainer(lora(), tmp_path / name, gate=gate)) for name, gate in gates)
    assert runs.equal(runs.weights(gated.model), runs.weights(plain.model))
    assert gated.ledger.flops == plain.ledger.flops
    assert gated.ledger.tokens_backpropagated == plain.ledger.tokens_backpropagated
    assert [p.train_loss for p in gated.curve.points] == [p.train_loss for p in plain.curve.points]


def test_a_rejected_window_leaves_weights_moments_and_gradients(tmp_path):
    run = runs.trainer(lora(), tmp_path, gate=novelty(lora()), params={"weight_decay": 0.1})
    run.gate = novelty(run.model)
    step, bare, states = run._close_window, [], []

    def state():
        return runs.weights(run.model), copy.deepcopy(run.optimizer.state_dict()["state"])

    def watching(backward):
        states.append(state())
        step(backward)
        bare.append(all(p.grad is None for p in run.model.parameters()))

    run._close_window = watching
    run.train()
    states.append(state())
    decisions = run.gate_log.decisions
    assert 3 < decisions.count(False) < 16 and len(bare) == len(decisions)
    for i in (i for i, accepted in enumerate(decisions) if not accepted):
        assert bare[i] and runs.equal(states[i][0], states[i + 1][0])
        for a, b in zip(states[i][1].values(), states[i + 1][1].values(), strict=True):
            assert runs.equal(list(a.values()), list(b.values()))
    accepted = decisions.index(True)
    assert not runs.equal(states[accepted][0], states[accepted + 1][0])


def test_one_forward_and_one_decision_per_window(tmp_path):
    model = lora()
    run = runs.trainer(model, tmp_path, gate=novelty(model), budget=Budget(15, "steps"))
    forwards = []
    model.bert.register_forward_hook(lambda *_: forwards.append(1) if model.training else None)
    run.train()
    assert len(run.gate_log.decisions) == run.ledger.steps == 15
    assert len(forwards) == 28  # two a step, one in the last of an epoch of 13 batches
    assert run.ledger.accepted_steps == sum(run.gate_log.decisions) < 15
    assert 0 < run.ledger.flops_backward < run.ledger.flops_forward
    assert run.ledger.flops_gate > 0


def test_the_gate_sees_the_gradient_of_the_whole_window(tmp_path):
    made = []
    for size, accumulation in ((16, 1), (8, 2), (4, 4)):
        model = lora()
        gate, seen = novelty(model), []
        decide = gate.decide
        gate.decide = lambda measured, seen=seen, decide=decide: (seen.append(measured), decide(measured))[1]
        params = {"batch_size": size, "gradient_accumulation": accumulation, "optimizer": "sgd"}
        runs.trainer(model, tmp_path / str(size), gate=gate, budget=Budget(5, "steps"), params=params).train()
        made.append(torch.stack(seen))
    for other in made[1:]:
        assert torch.allclose(made[0], other, atol=1e-4 * made[0].norm())


def test_a_rejected_batch_logs_the_loss_it_had(tmp_path):
    params = {"gradient_accumulation": 1}
    run = runs.ran(runs.trainer(lora(), tmp_path, gate=runs.Closed(), params=params))
    still = runs.ran(runs.trainer(lora(), tmp_path / "b", params=params | {"learning_rate": 1e-30}))
    losses = [[p.train_loss for p in r.curve.points] for r in (run, still)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# batches without labels, gates that never open ------------------------------------------------------


@pytest.mark.parametrize("gate", ["none", "novelty", "loss_floor", "random"])
def test_batches_without_a_label_are_skipped_and_counted(tmp_path, gate):
    model = attach(runs.tiny_gemma(), "lora", rank=4, seed=0)
    made = build_gate(runs.batch_gate(gate, rate=0.9, burn_in=3, m=64, k=8), model, "causal")
    options = {"params": {"gradient_accumulation": 1}, "train_dataset": runs.half_empty(), "gate": made}
    run = runs.trainer(model, tmp_path, budget=Budget(10, "steps"), language=True, **options)
    run.args.train_sampling_strategy = "sequential"
    run.train()
    assert run.ledger.steps == 10 and run.ledger.steps_without_labels == 5
    assert run.ledger.accepted_steps == (5 if gate == "none" else sum(run.gate_log.decisions))
    assert gate == "none" or len(run.gate_log.decisions) == 5


def test_a_run_that_never_trains_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(window, "STALLED", 30)
    run = runs.trainer(lora(), tmp_path, gate=runs.Closed(), budget=Budget(10, "accepted_steps"))
    with pytest.raises(Diverged, match="30 batches in a row"):
        run.train()


@pytest.mark.parametrize("gate", ["none", "random"])
def test_a_run_without_labels_is_ended(tmp_path, monkeypatch, gate):
    monkeypatch.setattr(window, "STALLED", 5)
    model = attach(runs.tiny_gemma(), "lora", rank=4, seed=0)
    options = {"train_dataset": runs.half_empty().select(range(8)), "params": {"gradient_accumulation": 1}}
    options |= {"gate": build_gate(runs.batch_gate(gate, burn_in=3), model, "causal")}
    with pytest.raises(Diverged, match="5 batches in a row had no label"):
        runs.trainer(model, tmp_path, language=True, budget=Budget(10, "accepted_steps"), **options).train()


def test_adapters_without_gradient_are_noticed(tmp_path):
    model = lora()
    run = runs.trainer(model, tmp_path, gate=runs.Open(), budget=Budget(6, "steps"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.register_hook(torch.zeros_like)
    with pytest.warns(GateWarning, match="no gradient reached an adapter"):
        run.train()


@pytest.mark.parametrize("gate", [None, runs.Open()])
def test_an_adapter_that_the_loss_does_not_reach_is_refused_after_the_first_step(tmp_path, gate):
    def started(**config):
        model = runs.tiny_bert()
        model.bert.beside = torch.nn.Linear(4, 4)
        model.config.update(config)
        options = {"gate": gate} if gate else {}
        return runs.trainer(attach(model, "lora", seed=0), tmp_path, budget=Budget(4, "steps"), **options)

    with pytest.raises(ParameterError, match="^target_modules='bert.beside': no gradient reached 1 adapters by step 1"):
        started().train()
    for irregular in ({"moe_num_experts": 4}, {"encoder": {"layerdrop": 0.1}}):
        with pytest.warns(GateWarning, match="no gradient reached 1 adapters by step 3: .* bert.beside"):
            started(**irregular).train()


@pytest.mark.parametrize("config", [None, SimpleNamespace(num_labels=2), {"experts": 3}])
def test_a_configuration_of_ones_own_says_nothing_of_layers(config):
    assert not window.leaves_layers_out(SimpleNamespace(config=config))


# resume --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["novelty", "novelty_loss", "random"])
def test_a_budget_run_resumes_bitwise(tmp_path, name):
    def made(part):
        model = lora()
        settings = runs.batch_gate(name, rate=0.4, burn_in=4, m=64, k=8, topk=0, ema=0.1, refresh=2)
        return runs.trainer(model, tmp_path / part, gate=build_gate(settings, model, "classify"), save_steps=4)

    whole, resumed = runs.killed_and_resumed(made, 21)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert whole.gate_log.decisions == resumed.gate_log.decisions
    assert 0 < sum(whole.gate_log.decisions) < len(whole.gate_log.decisions)
    assert same(whole.gate.state_dict(), resumed.gate.state_dict())
    assert whole.gate_log.report() == resumed.gate_log.report()


def same(first, second) -> bool:
    """Bitwise equality of two nests of tensors and values."""
    if torch.is_tensor(first):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    return first == second


def test_slora_trainer_resumes_bitwise(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 7}
    whole, resumed = runs.killed_and_resumed(lambda part: slora(lora(), tmp_path / part, **options), 11)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert same(whole.gate.state_dict(), resumed.gate.state_dict())
    assert whole.gate_log.decisions == resumed.gate_log.decisions
    assert whole.ledger.accepted_steps == resumed.ledger.accepted_steps


def test_a_checkpoint_without_the_gates_state_is_an_error(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    slora(lora(), tmp_path / "a", **options).train()
    (tmp_path / "a" / "checkpoint-5" / checkpoint.STATE).unlink()
    with pytest.raises(CheckpointError, match="gate.pt is missing"):
        slora(lora(), tmp_path / "a", **options).train(resume_from_checkpoint=True)
    slora(lora(), tmp_path / "b", gate_config=None, **options).train()
    with pytest.raises(CheckpointError, match="no state of 'novelty'"):
        slora(lora(), tmp_path / "b", **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("language", [False, True])
def test_a_second_training_starts_as_the_first_did(tmp_path, language):
    """The weights stay; gate, token selection, log and ledger are those of a trainer that has not trained yet."""
    made = flora_runs.flora(flora_runs.decoder(), tmp_path, gate_config=GATE) if language else slora(lora(), tmp_path)
    started, begin = [], made.run.begin

    def seen(resumed):
        begin(resumed)
        parts = made.gate, made.tokens, made.gate_log, made.ledger
        started.append(copy.deepcopy([part.state_dict() for part in parts]))

    made.run.begin = seen
    made.train()
    assert made.gate_log.decisions and made.ledger.steps and (not language or made.tokens.shares.draws)
    steps, decided = made.ledger.steps, len(made.gate_log.decisions)
    made.train()
    first, second = (dict(enumerate(tree_leaves(one))) for one in started)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert (made.ledger.steps, len(made.gate_log.decisions)) == (steps, decided)
