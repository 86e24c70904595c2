"""Training on chosen tokens: denominators, logs, costs, resume, and a batch gate before the tokens' own."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from torch import Tensor, nn

import lorakit
from lorakit.adapters import attach
from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.gates import build_gate
from lorakit.gates.look import GateLook
from lorakit.head import find_head
from lorakit.params import Params
from lorakit.seams import Candidate, Gate
from lorakit.settings import Gating
from lorakit.sketches import head_gradient
from lorakit.skip.controller import SkipLoRA
from lorakit.tokens import build_tokens
from lorakit.training import Budget, BudgetTrainer, FLoRATrainer, SLoRATrainer
from lorakit.training.arguments import training_arguments
from lorakit.training.loss import MeanLoss

MODES = ("gather", "fractional")
modes = pytest.mark.parametrize("mode", MODES)
GATE = {"m": 64, "k": 8, "target_novelty": 0.4, "burn_in": 4, "reorth_every": 2, "k_topk": 16, "novelty_ema_rate": 0.1}


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_is_no_garbage():
    """Every `train()` collects garbage, and looking through all that was imported costs more than these runs."""
    gc.freeze()
    yield
    gc.unfreeze()


class Open(Gate):
    """Accepts everything, but through the window's end like every gate that selects."""

    name, selective = "open", True


def decoder(**options) -> nn.Module:
    """Adapters that are no longer zero on a small Gemma with both kinds of layers."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    return adapted(runs.tiny_gemma(**layers | options))


def adapted(model: nn.Module) -> nn.Module:
    model, generator = attach(model, "lora", rank=4, seed=0), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def arguments(folder, **options):
    from transformers import TrainingArguments

    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3}
    sizes = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1}
    return TrainingArguments(
        output_dir=str(folder), label_names=["labels"], remove_unused_columns=False, **quiet | sizes | options
    )


def flora(model, folder, gating=None, gate_config=None, gate=None, data=None, **options) -> FLoRATrainer:
    """A FLoRATrainer on random rows."""
    return FLoRATrainer(
        model,
        arguments(folder, **options),
        train_dataset=runs.language_rows() if data is None else data,
        eval_dataset=runs.language_rows(16, seed=1),
        data_collator=runs.collate_language,
        gating={"method": "flora", "topk_tokens": 0.3} | (gating or {}),
        gate_config=gate_config,
        gate=gate,
    )


def budgeted(model, folder, gating=None, data=None, params=None, budget=6, kind="causal", **options) -> BudgetTrainer:
    """A BudgetTrainer on the same rows."""
    values = {"batch_size": 8, "gradient_accumulation": 2, "learning_rate": 1e-2, "seed": 3, "warmup": 0.0}
    settings = Gating(**{"method": "flora", "topk_tokens": 0.3} | (gating or {}))
    return BudgetTrainer(
        model=model,
        args=training_arguments(Params(**values | (params or {})), str(folder)),
        train_dataset=runs.language_rows() if data is None else data,
        eval_dataset=runs.language_rows(16, seed=1),
        data_collator=runs.collate_language,
        compute_metrics=runs.metrics,
        kind=kind,
        budget=Budget(budget, "steps"),
        tokens=build_tokens(settings, model, kind, seed=3),
        **options,
    )


def ledger(run) -> dict:
    return run.ledger.state_dict() | {"seconds": 0}


# everything is the plain trainer ---------------------------------------------------------------------


@modes
def test_every_token_is_bitwise_the_plain_trainer(tmp_path, mode):
    from transformers import Trainer

    ours = flora(decoder(), tmp_path / "a", {"topk_tokens": 1.0, "mode": mode})
    plain = Trainer(
        decoder(),
        arguments(tmp_path / "b"),
        train_dataset=runs.language_rows(),
        data_collator=runs.collate_language,
        compute_loss_func=MeanLoss("causal"),
    )
    ours.train()
    plain.train()
    assert runs.equal(runs.weights(ours.model), runs.weights(plain.model))
    logged = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (ours, plain)]
    assert logged[0] == logged[1]


@modes
def test_nearly_every_token_is_the_plain_trainer_but_for_rounding(tmp_path, mode):
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "gradient_accumulation_steps": 2}
    rows = runs.language_rows().map(lambda row: {"labels": row["input_ids"]})  # a prompt's tokens would not be chosen
    ours, plain = (
        flora(decoder(), tmp_path / str(share), {"topk_tokens": share, "mode": mode}, data=rows, **sgd)
        for share in (0.9999, 1.0)
    )
    ours.train()
    plain.train()
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


CHOICES = [
    {"method": "random"},
    {"score": "loss"},
    {"policy": "pps", "score": "loss"},
    {"policy": "pps", "score": "loss", "per": "sequence"},
]


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
    [
        ("gather", None, "topk"),
        ("fractional", None, "pps"),
        ("gather", runs.Alternating, "pps"),
        ("fractional", runs.Closed, "topk"),
    ],
)
def test_the_loss_logged_is_the_mean_over_all_labels(tmp_path, mode, gate, policy):
    chosen = flora(decoder(), tmp_path / "a", {"mode": mode, "policy": policy}, gate=gate and gate(), **STILL)
    plain = flora(decoder(), tmp_path / "b", {"method": "baseline"}, **STILL)
    for run in (chosen, plain):
        run.train()
    logged = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (chosen, plain)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4) and len(logged[0]) == 4


def test_the_curves_training_loss_is_the_mean_over_all_labels(tmp_path):
    still = {"params": {"learning_rate": 1e-30}, "evaluations": 3}
    chosen = budgeted(decoder(), tmp_path / "a", {"mode": "fractional"}, **still)
    plain = budgeted(decoder(), tmp_path / "b", {"method": "baseline"}, **still)
    for run in (chosen, plain):
        run.train()
    losses = [[point.train_loss for point in run.curve.points] for run in (chosen, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"method": "random"}])
def test_costs_of_both_modes(tmp_path, settings):
    made = {}
    for mode in (*MODES, "none"):
        given = settings | {"mode": mode} if mode != "none" else {"method": "baseline"}
        run = budgeted(decoder(), tmp_path / mode, given)
        run.train()
        made[mode] = run
    gather, fractional, plain = (made[mode].ledger for mode in (*MODES, "none"))
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
        metrics = [
            made(model, tmp_path / name, gating).evaluate()
            for name, gating in (("b", {"mode": "fractional"}), ("c", {"method": "baseline"}))
        ]
        assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"] > 0


def test_evaluating_often_changes_nothing(tmp_path):
    gating = {"mode": "fractional", "policy": "pps"}
    often = flora(decoder(), tmp_path / "a", gating, eval_strategy="steps", eval_steps=3)
    never = flora(decoder(), tmp_path / "b", gating)
    often.train()
    never.train()
    assert runs.equal(runs.weights(often.model), runs.weights(never.model))
    assert ledger(often) == ledger(never) and often.tokens.state_dict() == never.tokens.state_dict()


# batches without labels ------------------------------------------------------------------------------


def half_empty():
    """Every other batch of eight rows has no label, the first one too."""
    rows = runs.language_rows(80)
    return rows.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i % 16 < 8 else row, with_indices=True)


@pytest.mark.parametrize(
    ("mode", "method", "gate"),
    [
        ("gather", "random", "none"),
        ("fractional", "random", "none"),
        ("fractional", "flora", "none"),
        ("gather", "random", "novelty"),
        ("fractional", "flora", "novelty"),
        ("fractional", "random", "random"),
    ],
)
def test_batches_without_a_label_are_skipped_and_counted(tmp_path, mode, method, gate):
    model = decoder()
    made = build_gate(runs.batch_gate(gate, rate=0.9, burn_in=3, m=64, k=8), model, "causal")
    settings = {"method": method, "mode": mode}
    options = {"params": {"gradient_accumulation": 1}, "data": half_empty(), "gate": made, "budget": 8}
    run = budgeted(model, tmp_path, settings, **options)
    run.args.train_sampling_strategy = "sequential"
    run.train()
    assert run.ledger.steps == 8 and run.ledger.steps_without_labels == 4
    assert run.ledger.accepted_steps == (4 if gate == "none" else sum(run.gate_log.decisions))
    assert gate == "none" or len(run.gate_log.decisions) == 4


@modes
def test_a_micro_batch_without_a_label_weighs_nothing(tmp_path, mode):
    """Two micro-batches, one of them empty, step as the other does alone."""
    rows = half_empty()
    settings = {"mode": mode, "score": "loss", "per": "sequence"}
    options = SGD | {"max_steps": 1, "train_sampling_strategy": "sequential"}
    both = flora(decoder(), tmp_path / "a", settings, data=rows, gradient_accumulation_steps=2, **options)
    alone = flora(decoder(), tmp_path / "b", settings, data=rows.select(range(8, 16)), **options)
    for run in (both, alone):
        run.train()
    for a, b in zip(runs.weights(both.model), runs.weights(alone.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# resume ---------------------------------------------------------------------------------------------


RESUMED = [
    {"method": "random", "mode": "gather"},
    {"method": "random", "mode": "fractional"},
    {"policy": "topk", "mode": "gather"},
    {"policy": "topk", "mode": "fractional"},
    {"policy": "pps", "mode": "gather"},
    {"policy": "pps", "mode": "fractional", "per": "sequence"},
]


@pytest.mark.parametrize("settings", RESUMED, ids=lambda settings: "-".join(settings.values()))
def test_a_budget_run_resumes_bitwise(tmp_path, settings):
    def made(folder):
        return budgeted(decoder(), folder, settings, save_steps=3)

    whole, killed = made(tmp_path / "whole"), made(tmp_path / "killed")
    whole.train()
    runs.kill(killed, 9)
    resumed = made(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert whole.tokens.state_dict() == resumed.tokens.state_dict()
    assert whole.tokens.shares.draws == 12
    assert ledger(whole) == ledger(resumed)


@pytest.mark.parametrize("gate_config", [None, GATE])
@pytest.mark.parametrize("settings", RESUMED[-2:], ids=lambda settings: settings["mode"])
def test_flora_trainer_resumes_bitwise(tmp_path, settings, gate_config):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    whole, killed, resumed = (
        flora(decoder(), tmp_path / folder, settings, gate_config, **options)
        for folder in ("whole", "killed", "killed")
    )
    whole.train()
    runs.kill(killed, 5)
    resumed.train(resume_from_checkpoint=True)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert whole.tokens.state_dict() == resumed.tokens.state_dict()
    assert whole.gate_log.decisions == resumed.gate_log.decisions
    assert ledger(whole) == ledger(resumed)


def test_a_checkpoint_without_the_selections_state_is_an_error(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    flora(decoder(), tmp_path, {"method": "baseline"}, **options).train()
    with pytest.raises(CheckpointError, match=r"no state of .*tokens \(flora\)"):
        flora(decoder(), tmp_path, {}, **options).train(resume_from_checkpoint=True)


def test_a_budget_run_of_another_selection_is_another_run(tmp_path):
    given = {"model": "toy-decoder", "task": "toy-instruct", "budget": 2, "save_steps": 1, "run_dir": str(tmp_path)}
    quick = {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "max_test": 4, "max_validation": 4}
    small = {"batch_size": 2, "max_length": 64, "max_train": 16}
    lorakit.run(given | quick | small | {"gating": {"method": "flora", "topk_tokens": 0.2}})
    with pytest.raises(CheckpointError, match="checkpoint of another run: gating="):
        lorakit.run(given | quick | small | {"gating": {"method": "flora", "topk_tokens": 0.4}})


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
    run = flora(model, tmp_path, {"mode": mode}, gate=runs.Closed(), max_steps=6, gradient_accumulation_steps=2)
    run.train()
    assert len(seen) == 12 and set(seen) == {16}
    assert runs.equal(runs.weights(model), before)
    assert run.ledger.accepted_steps == run.ledger.flops_backward == run.ledger.tokens_backpropagated == 0
    assert all(p.grad is None for p in model.parameters())


def test_an_accepted_window_runs_the_chosen_tokens_again(tmp_path):
    model = decoder()
    seen = passes(model)
    settings = {"mode": "fractional", "per": "sequence"}
    run = flora(model, tmp_path, settings, gate=runs.Alternating(), max_steps=4, gradient_accumulation_steps=2)
    run.train()
    assert run.gate_log.decisions == [True, False, True, False]
    assert [width == 16 for width in seen] == [True, True, False, False, True, True] * 2
    assert set(seen) - {16} <= {2, 3, 4}  # 0.3 of the longest row's 12 or 13 predictions, in one row or two


@pytest.mark.parametrize(
    ("mode", "settings"),
    [("gather", {"method": "random"}), ("gather", {"policy": "pps"}), ("fractional", {"policy": "topk"})],
)
def test_an_open_gate_is_bitwise_no_gate(tmp_path, mode, settings):
    made = [
        flora(
            decoder(),
            tmp_path / str(i),
            settings | {"mode": mode},
            gate=gate,
            gradient_accumulation_steps=2,
            max_steps=4,
        )
        for i, gate in enumerate((Open(), None))
    ]
    for run in made:
        run.train()
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
        loss=mean(outputs, labels).detach(),
        logits=outputs.logits.detach(),
        labels=labels,
        hidden=hidden[0],
        kind="causal",
        softcap=softcap,
        token_losses=mean.token_losses,
    )
    monkeypatch.setattr(head_gradient, "BLOCK", 1)  # chunks of 16
    look = GateLook(gate, 1 / whole.targets, find_head(model, "causal"))
    tokens.select(model, inputs, labels, look)
    expected = gate.measure(whole)
    torch.testing.assert_close(look.measured(), expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))
    assert gate.flops(look.whole(labels, "causal")) == gate.flops(whole)
    nothing = GateLook(gate, 1.0, find_head(model, "causal")).measured()
    assert nothing.shape == expected.shape and not nothing.any()


@modes
def test_sloras_gate_goes_first(tmp_path, mode):
    run = flora(decoder(), tmp_path, {"mode": mode}, GATE, max_steps=14)
    run.train()
    accepted = sum(run.gate_log.decisions)
    assert 4 <= accepted < 14 == len(run.gate_log.decisions) == run.ledger.steps
    assert run.ledger.accepted_steps == accepted
    assert run.tokens.seen["chosen"] > 0
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert logged[-1]["gate/accepted_steps"] == accepted


# models and runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["masked", "peft", "nf4", "gpt2", "bf16"])
def test_flora_trainer_trains(tmp_path, which):
    from peft import LoraConfig, get_peft_model

    options = {"bf16": True} if which == "bf16" else {}
    settings = {"mode": "gather" if which == "masked" else "fractional"}
    if which == "masked":
        model = adapted(runs.tiny_masked())
    elif which == "peft":
        model = get_peft_model(runs.tiny_gemma(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    elif which == "nf4":
        model = adapted(lorakit.adapters.quantize_nf4(runs.tiny_gemma(hidden_size=64)))
    elif which == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = adapted(GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=32)))
    else:
        model = decoder()
    before = runs.weights(model)
    run = flora(model, tmp_path, settings, **options)
    run.train()
    assert run.ledger.accepted_steps == 6 and run.tokens.seen["chosen"] > 0
    after = runs.weights(model)
    assert not runs.equal(before, after) and all(torch.isfinite(weight).all() for weight in after)


TOY = {"model": "toy-decoder", "task": "toy-instruct", "budget": 3, "batch_size": 4, "max_length": 96, "rank": 4}
QUICK = {"evaluations": 1, "latency_repeats": 0, "max_test": 4, "max_validation": 4, "max_train": 32}


@pytest.mark.parametrize(("mode", "packing"), [("gather", False), ("fractional", True)])
def test_a_run_keeps_what_was_chosen(mode, packing):
    gating = {"method": "flora", "topk_tokens": 0.25, "mode": mode}
    record = lorakit.run(TOY | QUICK | {"gating": gating, "packing": packing})
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
    losses = [
        [point.train_loss for point in lorakit.run(TOY | QUICK | {"gating": gating, "predict_memory": known}).curve]
        for known in (False, True)
    ]
    assert losses[0] == losses[1]


def test_a_baseline_has_no_tokens_in_its_record():
    record = lorakit.run(TOY | QUICK | {"predict_memory": False, "budget": 1})
    assert "tokens" not in record.details


def test_an_encoder_and_a_gate_and_skipped_layers():
    given = {
        "task": "toy-stories",
        "gating": {"method": "flora"},
        "gate": "novelty",
        "gate_burn_in": 2,
        "skip": "prefix",
    }
    record = lorakit.run(QUICK | given | {"budget": 4, "batch_size": 4, "max_length": 64, "predict_memory": False})
    assert record.status == "done" and set(record.details) == {"tokens", "gate", "skip"}
    assert record.details["tokens"]["chosen"] > 0


# bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gating", "message"),
    [
        ({"fraction": 0.2}, "^gating.fraction=0.2: unknown key; known are method, topk_tokens"),
        ({"topk_tokens": 0.0}, "^gating.topk_tokens=0.0: .*greater than 0"),
        ({"topk_tokens": 1.2}, "^gating.topk_tokens=1.2: .*less than or equal to 1"),
        ({"sketch_dim": 1}, "^gating.sketch_dim=1: "),
        ({"topk_logits": -1}, "^gating.topk_logits=-1: "),
        ({"method": "slora"}, "^gating.method='slora': "),
    ],
)
def test_bad_settings_are_one_clear_error(tmp_path, gating, message):
    with pytest.raises(ParameterError, match=message):
        flora(decoder(), tmp_path, gating)


def test_what_does_not_go_together(tmp_path):
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
    skip = SkipLoRA(model, runs.skipping(), seed=0)
    with pytest.raises(ParameterError, match="^gating.mode='fractional': .*SkipLoRA"):
        budgeted(model, tmp_path, {"mode": "fractional"}, controllers=[skip])


def test_checkpointing_goes_with_gather(tmp_path):
    kept = {"activation_checkpointing_kwargs": {"use_reentrant": False}, "max_steps": 3}
    made = [
        flora(
            decoder(),
            tmp_path / str(on),
            {"score": "loss"},
            activation_checkpointing=on,
            **kept if on else {"max_steps": 3},
        )
        for on in (True, False)
    ]
    for run in made:
        run.train()
    for a, b in zip(*(runs.weights(run.model) for run in made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gating": {"method": "flora"}}, "^gating.method='flora': needs a language model"),
        ({"gating": {"method": "flora"}, "precision": "fp16"}, "^precision='fp16'"),
        ({"gating": {"method": "flora", "mode": "fractional"}, "gradient_checkpointing": True}, "^gradient_check"),
        ({"gating": {"method": "flora", "mode": "fractional"}, "skip": "prefix"}, "^gating.mode='fractional'"),
        ({"gating": {"method": "flora", "mode": "fractional"}, "task": "toy-stories"}, "^gating.mode='fractional'"),
        ({"gating": {"topk": 0.3}}, "^gating.topk=0.3: unknown"),
        ({"gating": 0.3}, "^gating=0.3: "),
    ],
)
def test_bad_parameters_of_a_run(given, message):
    with pytest.raises(ParameterError, match=message):
        lorakit.run(QUICK | given)


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
    run = SLoRATrainer(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=runs.language_rows(),
        data_collator=runs.collate_language,
        tokens=tokens,
    )
    run.train()
    assert run.tokens is tokens and tokens.seen["chosen"] > 0


def test_labels_are_left_alone():
    model = decoder()
    inputs = runs.collate_language(list(runs.language_rows(4)))
    labels: Tensor = inputs.pop("labels")
    before = labels.clone()
    build_tokens(Gating(method="random"), model, "causal").select(model, inputs, labels)
    assert torch.equal(labels, before)
