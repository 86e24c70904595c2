"""FLoRA resumes bitwise, behind a batch gate, in whole runs, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from flora_runs import MODES, adapted, arguments, budgeted, decoder, flora, ledger, modes
from slora_runs import GATE
from torch import Tensor, nn

import lorakit
from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.gates import build_gate
from lorakit.gates.look import GateLook
from lorakit.head import find_head
from lorakit.seams import Candidate
from lorakit.settings import Gating
from lorakit.sketches import head_gradient
from lorakit.skip.controller import SkipLoRA
from lorakit.tokens import build_tokens
from lorakit.training import FLoRATrainer, SLoRATrainer
from lorakit.training.loss import MeanLoss

# resume ---------------------------------------------------------------------------------------------


CHOICES = [{"method": "random"}, {"policy": "topk"}, {"policy": "pps"}]
RESUMED = [choice | {"mode": mode} for choice in CHOICES for mode in MODES]
RESUMED[-1]["per"] = "sequence"


@pytest.mark.parametrize("settings", RESUMED, ids=lambda settings: "-".join(settings.values()))
def test_a_budget_run_resumes_bitwise(tmp_path, settings):
    made = lambda part: budgeted(decoder(), tmp_path / part, settings, save_steps=3)  # noqa: E731
    whole, resumed = runs.killed_and_resumed(made, 9)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert whole.tokens.state_dict() == resumed.tokens.state_dict()
    assert whole.tokens.shares.draws == 12
    assert ledger(whole) == ledger(resumed)


@pytest.mark.parametrize("gate_config", [None, GATE])
@pytest.mark.parametrize("settings", RESUMED[-2:], ids=lambda settings: settings["mode"])
def test_flora_trainer_resumes_bitwise(tmp_path, settings, gate_config):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    made = lambda part: flora(decoder(), tmp_path / part, settings, gate_config, **options)  # noqa: E731
    whole, resumed = runs.killed_and_resumed(made, 5)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert whole.tokens.state_dict() == resumed.tokens.state_dict()
    assert whole.gate_log.decisions == resumed.gate_log.decisions
    assert ledger(whole) == ledger(resumed)


def test_a_checkpoint_without_the_selections_state_is_an_error(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    flora(decoder(), tmp_path, {"method": "baseline"}, **options).train()
    with pytest.raises(CheckpointError, match=r"no state of .*tokens \(flora\)"):
        flora(decoder(), tmp_path, {}, **options).train(resume_from_checkpoint=True)


# a batch gate first ---------------------------------------------------------------------------------


def passes(model: nn.Module) -> list[int]:
    """Tokens a row of every training pass of the layers, the trial before the first left out."""
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[1]) if module.training else None
    )
    return seen


@modes
def test_a_rejected_window_runs_no_second_pass_and_leaves_no_trace(tmp_path, mode):
    model = decoder()
    before, seen = runs.weights(model), passes(model)
    run = runs.ran(
        flora(model, tmp_path, {"mode": mode}, gate=runs.Closed(), max_steps=6, gradient_accumulation_steps=2)
    )
    assert len(seen) == 12 and set(seen) == {16}
    assert runs.equal(runs.weights(model), before)
    assert run.ledger.accepted_steps == run.ledger.flops_backward == run.ledger.tokens_backpropagated == 0
    assert all(p.grad is None for p in model.parameters())


def test_an_accepted_window_runs_the_chosen_tokens_again(tmp_path):
    model = decoder()
    seen = passes(model)
    settings = {"mode": "fractional", "per": "sequence"}
    run = runs.ran(
        flora(model, tmp_path, settings, gate=runs.Alternating(), max_steps=4, gradient_accumulation_steps=2)
    )
    assert run.gate_log.decisions == [True, False, True, False]
    assert [width == 16 for width in seen] == [True, True, False, False, True, True] * 2
    assert set(seen) - {16} <= {2, 3, 4}  # 0.3 of the longest row's 12 or 13 predictions, in one row or two


@pytest.mark.parametrize(
    ("mode", "settings"),
    [("gather", {"method": "random"}), ("gather", {"policy": "pps"}), ("fractional", {"policy": "topk"})],
)
def test_an_open_gate_is_bitwise_no_gate(tmp_path, mode, settings):
    options = {"gradient_accumulation_steps": 2, "max_steps": 4}
    made = [
        runs.ran(flora(decoder(), tmp_path / str(gate), settings | {"mode": mode}, gate=gate, **options))
        for gate in (runs.Open(), None)
    ]
    assert runs.equal(*(runs.weights(run.model) for run in made))
    assert made[0].ledger.tokens_backpropagated == made[1].ledger.tokens_backpropagated > 0
    assert made[0].ledger.flops_backward == made[1].ledger.flops_backward


@pytest.mark.parametrize("name", ["novelty", "novelty_loss", "least_novel", "gradient_norm", "loss_floor", "random"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_looking_on_measures_what_looking_at_the_whole_batch_does(monkeypatch, name, softcap):
    model = decoder()
    model.config.final_logit_softcapping = softcap
    model.config.use_cache = False
    inputs = runs.collate_language(list(runs.language_rows(4)))
    labels = inputs.pop("labels")
    tokens = build_tokens(Gating(method="random", topk_tokens=0.2), model, "causal")
    gate = build_gate(runs.batch_gate(name, m=64, k=8, topk=16), model, "causal")
    hidden = []
    handle = tokens.head.module.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    outputs = model(**inputs)
    handle.remove()
    mean = MeanLoss("causal")
    whole = Candidate(
        loss=mean(outputs, labels).detach(), logits=outputs.logits.detach(), labels=labels, hidden=hidden[0],
        kind="causal", softcap=softcap, token_losses=mean.token_losses,
    )  # fmt: skip
    monkeypatch.setattr(head_gradient, "BLOCK", 1)  # chunks of 16
    look = GateLook(gate, 1 / whole.targets, find_head(model, "causal"))
    tokens.select(model, inputs, labels, look)
    expected = gate.measure(whole)
    torch.testing.assert_close(look.measured(), expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))
    assert gate.flops(Candidate(torch.zeros(()), None, labels, kind="causal")) == gate.flops(whole)
    nothing = GateLook(gate, 1.0, find_head(model, "causal")).measured()
    assert nothing.shape == expected.shape and not nothing.any()


@modes
def test_sloras_gate_goes_first(tmp_path, mode):
    run = runs.ran(flora(decoder(), tmp_path, {"mode": mode}, GATE, max_steps=14))
    accepted = sum(run.gate_log.decisions)
    assert 4 <= accepted < 14 == len(run.gate_log.decisions) == run.ledger.steps
    assert run.ledger.accepted_steps == accepted
    assert run.tokens.seen["chosen"] > 0
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert logged[-1]["gate/accepted_steps"] == accepted


# models and runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["masked", "peft", "nf4", "gpt2", "bf16"])
def test_flora_trainer_trains(tmp_path, tiny_gpt2, which):
    from peft import LoraConfig, get_peft_model

    peft = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = {
        "masked": lambda: adapted(runs.tiny_masked()),
        "peft": lambda: get_peft_model(runs.tiny_gemma(), peft),
        "nf4": lambda: adapted(lorakit.adapters.quantize_nf4(runs.tiny_gemma(hidden_size=64))),
        "gpt2": lambda: adapted(tiny_gpt2()),
        "bf16": decoder,
    }[which]()
    before = runs.weights(model)
    settings = {"mode": "gather" if which == "masked" else "fractional"}
    run = runs.ran(flora(model, tmp_path, settings, bf16=which == "bf16"))
    assert run.ledger.accepted_steps == 6 and run.tokens.seen["chosen"] > 0
    after = runs.weights(model)
    assert not runs.equal(before, after) and all(torch.isfinite(weight).all() for weight in after)


TOY = {"model": "toy-decoder", "task": "toy-instruct", "budget": 3, "batch_size": 4, "max_length": 96, "rank": 4}
QUICK = runs.QUICK | {"max_train": 32}


@pytest.mark.parametrize(("mode", "packing"), [("gather", False), ("fractional", True)])
def test_a_run_keeps_what_was_chosen(mode, packing):
    gating = {"method": "flora", "topk_tokens": 0.25, "mode": mode}
    record = lorakit.run(TOY | QUICK | {"gating": gating, "packing": packing, "predict_memory": True})
    tokens = record.details["tokens"]
    assert record.status == "done" and record.method == "flora"
    assert tokens["gating"] == Gating(**gating).model_dump() == record.resolved["gating"]
    assert tokens["chosen"] == pytest.approx(0.25 * tokens["predictions"], rel=0.05)
    assert record.costs.flops == record.costs.flops_forward + record.costs.flops_backward + record.costs.flops_gate
    assert record.costs.predicted_memory["peak"] > 0
    expected = tokens["chosen"] if mode == "fractional" else record.costs.tokens
    assert record.costs.tokens_backpropagated == expected


def test_predicting_memory_draws_nothing():
    """The record is the same with and without; the selection's draws are the run's."""
    gating = {"method": "random", "topk_tokens": 0.25, "mode": "gather"}
    made = [lorakit.run(TOY | QUICK | {"gating": gating, "predict_memory": known}).curve for known in (False, True)]
    losses = [[point.train_loss for point in curve] for curve in made]
    assert losses[0] == losses[1]


def test_an_encoder_and_a_gate_and_skipped_layers():
    given = {"task": "toy-stories", "gating": {"method": "flora"}, "gate": "novelty", "gate_burn_in": 2}
    record = lorakit.run(QUICK | given | {"skip": "prefix", "budget": 4, "batch_size": 4, "max_length": 64})
    assert record.status == "done" and set(record.details) == {"tokens", "gate", "skip"}
    assert record.details["tokens"]["chosen"] > 0


# bad input ------------------------------------------------------------------------------------------


def test_what_does_not_go_together(tmp_path):
    with pytest.raises(ParameterError, match="^gating.fraction=0.2: unknown parameter; known are method, topk_tokens"):
        flora(decoder(), tmp_path, {"fraction": 0.2})
    half = arguments(tmp_path)
    half.fp16 = True
    for gating in ({"method": "random"}, {"method": "flora", "mode": "fractional"}):
        with pytest.raises(ParameterError, match="^precision='fp16': "):
            FLoRATrainer(decoder(), half, gating=gating)
    with pytest.raises(ParameterError, match="^gradient_checkpointing=True: .*'fractional'"):
        flora(decoder(), tmp_path, {"mode": "fractional"}, activation_checkpointing=True)
    with pytest.raises(ParameterError, match="^gating.method='flora': needs a language model"):
        FLoRATrainer(runs.tiny_bert(), arguments(tmp_path), gating={"method": "flora"})
    with pytest.raises(ParameterError, match="^gating.mode='fractional': needs a causal language model"):
        FLoRATrainer(runs.tiny_masked(), arguments(tmp_path), gating={"method": "flora", "mode": "fractional"})
    model = decoder()
    skip = SkipLoRA(model, settings=runs.skipping(), seed=0)
    with pytest.raises(ParameterError, match="^gating.mode='fractional': measures no layers"):
        budgeted(model, tmp_path, {"mode": "fractional"}, controllers=[skip])


def test_checkpointing_goes_with_gather(tmp_path):
    kept = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    made = [
        runs.ran(flora(decoder(), tmp_path / str(i), {"score": "loss"}, max_steps=3, **options))
        for i, options in enumerate((kept, {}))
    ]
    for a, b in zip(*(runs.weights(run.model) for run in made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_model_it_cannot_serve_is_refused_before_its_first_step(tmp_path):
    model = decoder()
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: out + 1)
    run = flora(model, tmp_path)
    before = runs.weights(model)
    with pytest.raises(LorakitError, match="not the head's linear map"):
        run.train()
    assert runs.equal(runs.weights(model), before)


def test_slora_trainer_takes_tokens(tmp_path):
    model = decoder()
    tokens = build_tokens(Gating(method="random"), model, "causal")
    data = {"train_dataset": runs.language_rows(), "data_collator": runs.collate_language}
    run = runs.ran(SLoRATrainer(model, arguments(tmp_path, max_steps=2), tokens=tokens, **data))
    assert run.tokens is tokens and tokens.seen["chosen"] > 0


def test_labels_are_left_alone():
    model = decoder()
    inputs = runs.collate_language(list(runs.language_rows(4)))
    labels: Tensor = inputs.pop("labels")
    before = labels.clone()
    build_tokens(Gating(method="random"), model, "causal").select(model, inputs, labels)
    assert torch.equal(labels, before)
