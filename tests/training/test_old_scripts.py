"""Arguments and models of scripts written for the plain Trainer: served as it serves them, or refused by name."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import training_runs as runs
from flora_runs import arguments, decoder, flora
from slora_runs import GATE, lora, slora
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from lorakit.adapters import attach, detach, export, quantize_nf4
from lorakit.errors import LorakitError, ParameterError
from lorakit.gates.log import GateWarning
from lorakit.training import Budget, FLoRATrainer, SLoRATrainer

# keys that only mean something beside another -------------------------------------------------------


@pytest.mark.parametrize(
    ("gating", "message"),
    [
        ({"topk_tokens": 0.2, "mode": "fractional"}, "^gating.topk_tokens=0.2: says nothing without gating.method"),
        ({"mode": "fractional"}, "^gating.mode='fractional': says nothing without gating.method"),
        ({"per": "sequence"}, "^gating.per='sequence': says nothing without gating.method"),
        ({"method": "random", "score": "loss"}, "^gating.score='loss': says nothing without gating.method 'flora'"),
        ({"method": "random", "policy": "pps"}, "^gating.policy='pps': says nothing without gating.method 'flora'"),
        (
            {"method": "flora", "score": "loss", "sketch_dim": 64},
            "^gating.sketch_dim=64: says nothing without gating.score",
        ),
    ],
)
def test_a_key_without_the_one_it_belongs_to_is_refused(tmp_path, gating, message):
    with pytest.raises(ParameterError, match=message):
        FLoRATrainer(decoder(), arguments(tmp_path), gating=gating)


# models of every kind -------------------------------------------------------------------------------

WORDS = {"vocab_size": 99, "pad_token_id": 0}


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **WORDS | sizes))


def tagger():
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return BertForTokenClassification(BertConfig(**WORDS | sizes | still))


def tags(batch):
    inputs = runs.collate_language(batch)
    return inputs | {"labels": inputs["labels"].clamp(min=-1).fmod(3).where(inputs["labels"] >= 0, -100)}


def embedded(batch):
    inputs = runs.collate_language(batch)
    table = torch.randn(99, 32, generator=torch.Generator().manual_seed(4))
    return {name: value for name, value in inputs.items() if name != "input_ids"} | {
        "inputs_embeds": table[inputs["input_ids"]]
    }


def still_decoder():
    return decoder(hidden_size=32)


MODELS = {
    "t5": (t5, runs.collate_language),
    "tagger": (tagger, tags),
    "embeddings": (still_decoder, embedded),
}
STEPS = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}


class Looking(runs.Open):
    needs_hidden = True


def on(trainer, folder, name, **options):
    build, collate = MODELS[name]
    data = {"train_dataset": runs.language_rows(), "eval_dataset": runs.language_rows(16, seed=1)}
    return trainer(model=build(), args=arguments(folder, **STEPS), data_collator=collate, **data, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gate", [None, runs.Open()], ids=["ungated", "gated"])
def test_a_model_is_trained_as_the_trainer_trains_it(tmp_path, name, gate):
    ours, plain = on(SLoRATrainer, tmp_path, name, gate=gate), on(Trainer, tmp_path, name)
    for run in (ours, plain):
        run.train()
    start = runs.weights(MODELS[name][0]())
    moved = [
        torch.cat([(a - b).flatten() for a, b in zip(runs.weights(run.model), start, strict=True)])
        for run in (ours, plain)
    ]
    assert moved[1].norm() > 1e-4 and (moved[0] - moved[1]).norm() < 1e-4 * moved[1].norm()
    assert ours.ledger.accepted_steps == 3 and ours.ledger.examples == 48 and ours.ledger.tokens > 0
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "name", "options", "message"),
    [
        (SLoRATrainer, "t5", {"gate_config": GATE}, "T5ForConditionalGeneration: a gate .* needs a classifier"),
        (SLoRATrainer, "tagger", {"gate_config": GATE}, "BertForTokenClassification: a gate .* needs a classifier"),
        (SLoRATrainer, "tagger", {"gate": Looking()}, "BertForTokenClassification: a gate .* needs a classifier"),
        (SLoRATrainer, "t5", {"loss": "exact"}, "T5ForConditionalGeneration: loss='exact' needs a classifier"),
        (SLoRATrainer, "tagger", {"loss": "exact"}, "BertForTokenClassification: loss='exact' needs a classifier"),
        (FLoRATrainer, "tagger", {"loss": "exact"}, "BertForTokenClassification: loss='exact' needs a classifier"),
        (FLoRATrainer, "t5", {"gating": {"method": "random"}}, "T5For.*: gating.method='random' needs a classifier"),
        (
            FLoRATrainer,
            "embeddings",
            {"gating": {"method": "random", "mode": "fractional"}},
            "^inputs_embeds='given': mode 'fractional' needs input_ids",
        ),
        (SLoRATrainer, "tagger", {"model_init": tagger}, "^model_init=.*give either it or a model"),
        (
            SLoRATrainer,
            "tagger",
            {"tokenizer": 1, "processing_class": 2},
            "^tokenizer='int': is called processing_class",
        ),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path, trainer, name, options, message):
    with pytest.raises(LorakitError, match=message):
        on(trainer, tmp_path, name, **options).train()


def test_embeddings_and_a_tokenizer_go_with_chosen_tokens(tmp_path):
    collator = {"gating": {"method": "flora", "score": "loss"}, "tokenizer": (named := Named())}
    run = on(FLoRATrainer, tmp_path, "embeddings", **collator)
    run.train()
    assert run.processing_class is named and run.tokens.seen["chosen"] > 0


class Named:
    """Stands for a tokenizer."""

    def save_pretrained(self, folder):
        """Writes nothing."""


def test_model_init_is_the_model_it_makes(tmp_path):
    data = {"args": arguments(tmp_path, **STEPS), "train_dataset": runs.language_rows(), "data_collator": tags}
    made = [SLoRATrainer(model_init=tagger, **data), Trainer(model=tagger(), **data)]
    for run in made:
        run.train()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(runs.weights(run.model) for run in made), strict=True))


def test_adapters_on_transformers_four_bit_model_are_adapters(tmp_path):
    """Of ours and of the plain Trainer, which refuses a 4-bit model that it knows no adapters of."""
    quantize_nf4(runs.tiny_bert(hidden_size=64), compute_dtype="fp32").save_pretrained(tmp_path / "packed")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path), train_dataset=runs.rows())
    attach(model, "lora", seed=0)
    before = runs.weights(model)
    data = {"train_dataset": runs.rows(), "data_collator": runs.collate}
    Trainer(model, arguments(tmp_path, max_steps=1), **data).train()
    after = runs.weights(model)
    assert not runs.equal(before, after)
    slora(model, tmp_path, gate_config=None, max_steps=1).train()
    assert not runs.equal(after, runs.weights(model))
    export(model, tmp_path / "whole")
    assert BertForSequenceClassification.from_pretrained(tmp_path / "whole").num_labels == 2
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(detach(model), arguments(tmp_path), train_dataset=runs.rows())
    slora(attach(model, "head"), tmp_path, gate_config=None, max_steps=1).train()


def test_naming_the_baseline_beside_other_keys_is_meant(tmp_path):
    """As in a loop over methods."""
    flora(decoder(), tmp_path, gating={"method": "baseline", "topk_tokens": 0.3, "mode": "fractional"})


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("made", ["gate", "flora"])
def test_no_hook_stays_on_the_model(tmp_path, made):
    model = decoder()
    before = hooks(model)
    for _ in range(2):
        run = slora(model, tmp_path, language=True, max_steps=6) if made == "gate" else flora(model, tmp_path)
        run.train()
        run.train()  # and again
        assert hooks(model) == before


# a budget beside the Trainer's own arguments --------------------------------------------------------


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize(
    ("changed", "steps", "evaluated", "saved"),
    [
        ({}, 6, [6], []),
        ({"max_steps": 4}, 4, [], []),
        ({"eval_strategy": "steps", "eval_steps": 2}, 6, [2, 4, 6], []),
        ({"save_strategy": "steps", "save_steps": 5}, 6, [6], [5]),
        ({"callbacks": [Stop()]}, 3, [], []),
    ],
)
def test_what_else_ends_evaluates_and_saves_a_run(tmp_path, changed, steps, evaluated, saved):
    from transformers.trainer_utils import IntervalStrategy

    callbacks = changed.pop("callbacks", [])
    run = runs.trainer(lora(), tmp_path, budget=Budget(6, "steps"), callbacks=callbacks, compute_metrics=None)
    for name, value in changed.items():
        setattr(run.args, name, IntervalStrategy(value) if name.endswith("strategy") else value)
    run.train()
    assert run.ledger.steps == steps
    points = {point.step: point.validation for point in run.curve.points}
    assert [step for step, found in points.items() if found] == evaluated
    assert all(set(found) == {"loss"} for found in points.values() if found)
    assert [int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")] == saved


# steps are candidates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "warmup", "warned"), [(runs.Alternating, 4, True), (runs.Alternating, 3, False), (lambda: None, 6, False)]
)
def test_a_run_that_accepts_less_than_its_warm_up_is_warned_about(tmp_path, gate, warmup, warned):
    """Of six candidates every other is accepted: three."""
    data = {"train_dataset": runs.rows(), "data_collator": runs.collate}
    run = SLoRATrainer(lora(), arguments(tmp_path, max_steps=6, warmup_steps=warmup), gate=gate(), **data)
    expected = (
        pytest.warns(GateWarning, match="3 accepted steps, fewer than its warm-up of 4") if warned else nullcontext()
    )
    with expected:
        run.train()
    assert run.ledger.accepted_steps == (6 if gate is not runs.Alternating else 3)
