"""Whole runs with the exact loss against the same runs with all logits: weights, curves, decisions, resumption."""

from __future__ import annotations

import decoders
import pytest
import torch
import training_runs as runs
from flora_runs import arguments, decoder
from transformers import Trainer

import lorakit
from lorakit.adapters import attach
from lorakit.errors import ParameterError
from lorakit.gates import build_gate
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens
from lorakit.training import Budget, FLoRATrainer, SLoRATrainer

SETTINGS = {"batch_size": 8, "gradient_accumulation": 2, "learning_rate": 1e-2, "warmup": 0.0}


def run(folder, loss: str, gate: str = "none", budget: int = 6, model=None, kind="causal", save_steps=0, **params):
    model = decoder() if model is None else model
    gated = runs.batch_gate(gate, rate=0.5, burn_in=2, m=64, k=8)
    return runs.trainer(
        model, folder, language=True, budget=Budget(budget, "steps"), params=SETTINGS | params,
        gate=build_gate(gated, model, kind), evaluations=2, save_steps=save_steps,
        tokens=build_tokens(Gating(), model, kind, loss=TokenSettings(loss=loss)),
    )  # fmt: skip


@pytest.mark.parametrize("gate", ["none", "novelty", "random", "loss_floor"])
def test_a_run_is_that_of_all_logits(tmp_path, gate):
    plain, exact = (runs.ran(run(tmp_path / loss, loss, gate)) for loss in ("nll", "exact"))
    assert plain.gate_log.decisions == exact.gate_log.decisions
    assert gate == "none" or {True, False} == set(plain.gate_log.decisions)
    for a, b in zip(runs.weights(plain.model), runs.weights(exact.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def curve(trainer) -> list[float]:
        """Of every point what was measured there: the training loss, the validation loss."""
        points = [(point.train_loss, (point.validation or {}).get("loss")) for point in trainer.curve.points]
        return [loss for pair in points for loss in pair if loss is not None]

    assert len(curve(exact)) > 4 and curve(exact) == pytest.approx(curve(plain), rel=1e-4)
    assert exact.ledger.flops < plain.ledger.flops and exact.ledger.tokens == plain.ledger.tokens


def test_checkpointing_of_activations_goes_with_it(tmp_path):
    plain, kept = (
        runs.ran(run(tmp_path / str(on), "exact", gradient_checkpointing=on, budget=3)) for on in (False, True)
    )
    for a, b in zip(runs.weights(plain.model), runs.weights(kept.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", ["none", "novelty"])
def test_resumes_bitwise(tmp_path, gate):
    def made(name: str):
        return run(tmp_path / name, "exact", gate, save_steps=2)

    whole, resumed = runs.killed_and_resumed(made, after=7)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert whole.gate_log.decisions == resumed.gate_log.decisions
    assert whole.ledger.flops == resumed.ledger.flops


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("trainer", [SLoRATrainer, FLoRATrainer])
def test_the_trainers_exact_loss_is_the_plain_trainers(tmp_path, trainer, smoothing):
    given = {"gradient_accumulation_steps": 2, "label_smoothing_factor": smoothing, "max_steps": 4}
    data = {"train_dataset": runs.language_rows(), "data_collator": runs.collate_language}
    ours = trainer(decoder(), arguments(tmp_path / "a", **given), loss="exact", **data)
    ours.train()
    theirs = Trainer(decoder(), arguments(tmp_path / "b", **given), **data)
    theirs.train()
    for a, b in zip(runs.weights(ours.model), runs.weights(theirs.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_masked_language_model_and_dft(tmp_path):
    for loss in ("exact", "dft"):
        model = decoders.nonzero(attach(runs.tiny_masked(), "lora", rank=4, seed=0))
        trainer = run(tmp_path / loss, loss, model=model, kind="masked", budget=3)
        trainer.kind = "masked"
        before = runs.weights(model)
        runs.ran(trainer)
        assert trainer.curve.points[-1].validation["loss"] > 0 and not runs.equal(before, runs.weights(model))


def test_what_a_trainer_refuses(tmp_path):
    data = {"train_dataset": runs.language_rows(), "data_collator": runs.collate_language}
    smoothed = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ParameterError, match="^loss='dft': .*label_smoothing_factor=0.1"):
        SLoRATrainer(decoder(), smoothed, loss="dft", **data)
    with pytest.raises(ParameterError, match="^loss='exactly'"):
        SLoRATrainer(decoder(), arguments(tmp_path), loss="exactly", **data)
    with pytest.raises(ParameterError, match="^label_smoothing_factor=0.1: chosen tokens"):
        FLoRATrainer(decoder(), smoothed, gating={"method": "flora"}, **data)
    with pytest.raises(ParameterError, match="^compute_loss_func="):
        SLoRATrainer(decoder(), arguments(tmp_path), loss="exact", compute_loss_func=lambda *_: None, **data)


def test_a_classifier_has_its_own_and_its_record_says_so(tmp_path):
    quick = {"budget": 2, "max_test": 8, "max_validation": 8, "evaluations": 1, "latency_repeats": 0}
    note = "loss 'exact': a classifier's is its own, of all its logits"
    assert note in lorakit.run(quick | {"loss": "exact"}).notes
    assert note not in lorakit.run(quick).notes
    with pytest.raises(ParameterError, match="^loss='dft': needs a language model"):
        lorakit.run(quick | {"loss": "dft"})


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_prompts_are_trained_with_it(kind):
    quick = {"budget": 2, "max_test": 8, "max_validation": 8, "evaluations": 1, "latency_repeats": 0}
    toy = {"model": "toy-decoder", "task": "toy-instruct", "method": "peft", "peft_type": kind}
    options = {"peft_options": {"num_virtual_tokens": 3}}
    losses = [lorakit.run(quick | toy | options | {"loss": loss}).final["test"]["loss"] for loss in ("exact", "nll")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_penalty_in_the_models_own_loss_is_refused_before_anything_is_loaded():
    toy = {"model": "toy-decoder", "task": "toy-instruct", "method": "peft", "peft_type": "ADALORA"}
    with pytest.raises(ParameterError, match="^loss='exact': AdaLoRA adds its penalty to the model's own loss: 'nll'"):
        lorakit.run(toy)
