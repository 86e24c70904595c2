"""Gated training: one forward, whole windows, no trace of what was rejected, bitwise resume, PEFT and 4-bit models."""

from __future__ import annotations

import copy

import pytest
import torch
import training_runs as runs

from lorakit.adapters import attach, quantize_nf4
from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.gates import build_gate
from lorakit.gates.log import GateWarning
from lorakit.seams import Decision, Gate
from lorakit.training import Budget, Diverged, SLoRATrainer, checkpoint, window

GATE = {"m": 64, "k": 8, "target_novelty": 0.4, "burn_in": 4, "reorth_every": 2, "k_topk": 16, "novelty_ema_rate": 0.1}


class Open(Gate):
    """Accepts everything, but through the window's end like every gate that selects."""

    name, selective = "open", True


def novelty(model, kind="classify"):
    settings = runs.batch_gate("novelty", rate=0.4, burn_in=4, m=64, k=8, topk=0, ema=0.1, refresh=2)
    return build_gate(settings, model, kind, seed=0)


def lora(model=None):
    return attach(runs.tiny_bert() if model is None else model, "lora", rank=4, seed=0)


def arguments(folder, **options):
    from transformers import TrainingArguments

    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3}
    sizes = {"per_device_train_batch_size": 8, "max_steps": 20, "learning_rate": 1e-2, "logging_steps": 1}
    return TrainingArguments(
        output_dir=str(folder), label_names=["labels"], remove_unused_columns=False, **quiet | sizes | options
    )


def slora(model, folder, gate_config=GATE, language=False, **options):
    """A SLoRATrainer on random rows."""
    made, collate = (runs.language_rows, runs.collate_language) if language else (runs.rows, runs.collate)
    return SLoRATrainer(
        model,
        arguments(folder, **options),
        train_dataset=made(),
        eval_dataset=made(16, seed=1),
        data_collator=collate,
        gate_config=gate_config,
    )


# what a gate may not change ------------------------------------------------------------------------


def test_accepting_every_window_is_bitwise_no_gate_at_all(tmp_path):
    gated, plain = (runs.trainer(lora(), tmp_path / name, gate=gate) for name, gate in (("a", Open()), ("b", None)))
    gated.train()
    plain.train()
    assert runs.equal(runs.weights(gated.model), runs.weights(plain.model))
    assert gated.ledger.flops == plain.ledger.flops
    assert gated.ledger.tokens_backpropagated == plain.ledger.tokens_backpropagated
    assert [p.train_loss for p in gated.curve.points] == [p.train_loss for p in plain.curve.points]


def test_a_rejected_window_leaves_weights_moments_and_gradients(tmp_path):
    run = runs.trainer(lora(), tmp_path, gate=novelty(lora()), params={"weight_decay": 0.1})
    run.gate = novelty(run.model)
    seen = []
    step = run._close_window

    def watching(backward):
        before = (runs.weights(run.model), copy.deepcopy(run.optimizer.state_dict()["state"]))
        step(backward)
        seen.append((run.gate_log.decisions[-1], before, [p.grad is None for p in run.model.parameters()]))

    run._close_window = watching
    run.train()
    states = [before for _, before, _ in seen] + [
        (runs.weights(run.model), copy.deepcopy(run.optimizer.state_dict()["state"]))
    ]
    rejected = [i for i, (accept, _, _) in enumerate(seen) if not accept]
    assert 3 < len(rejected) < 16
    for i in rejected:
        assert all(seen[i][2])
        assert runs.equal(states[i][0], states[i + 1][0])
        for a, b in zip(states[i][1].values(), states[i + 1][1].values(), strict=True):
            assert runs.equal(list(a.values()), list(b.values()))
    accepted = next(i for i, (accept, _, _) in enumerate(seen) if accept)
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
    run = runs.trainer(lora(), tmp_path, gate=runs.Closed(), params={"gradient_accumulation": 1})
    run.train()
    still = runs.trainer(lora(), tmp_path / "b", params={"gradient_accumulation": 1, "learning_rate": 1e-30})
    still.train()
    losses = [[p.train_loss for p in r.curve.points] for r in (run, still)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# batches without labels, gates that never open ------------------------------------------------------


@pytest.mark.parametrize("gate", ["none", "novelty", "loss_floor", "random"])
def test_batches_without_a_label_are_skipped_and_counted(tmp_path, gate):
    rows = runs.language_rows(80)
    empty = rows.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i % 16 < 8 else row, with_indices=True)
    model = attach(runs.tiny_gemma(), "lora", rank=4, seed=0)
    settings = runs.batch_gate(gate, rate=0.9, burn_in=3, m=64, k=8)
    run = runs.trainer(model, tmp_path, budget=Budget(10, "steps"), params={"gradient_accumulation": 1})
    run = type(run)(
        model=model,
        args=run.args,
        train_dataset=empty,
        eval_dataset=rows.select(range(8)),
        data_collator=runs.collate_language,
        kind="causal",
        budget=Budget(10, "steps"),
        gate=build_gate(settings, model, "causal"),
        compute_metrics=runs.metrics,
    )
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


def test_adapters_without_gradient_are_noticed(tmp_path):
    model = lora()
    run = runs.trainer(model, tmp_path, gate=Open(), budget=Budget(6, "steps"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.register_hook(torch.zeros_like)
    with pytest.warns(GateWarning, match="no gradient reached an adapter"):
        run.train()


# resume --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["novelty", "novelty_loss", "random"])
def test_a_budget_run_resumes_bitwise(tmp_path, name):
    def made(folder):
        model = lora()
        settings = runs.batch_gate(name, rate=0.4, burn_in=4, m=64, k=8, topk=0, ema=0.1, refresh=2)
        return runs.trainer(model, folder, gate=build_gate(settings, model, "classify"), save_steps=4)

    whole, killed = made(tmp_path / "whole"), made(tmp_path / "killed")
    whole.train()
    runs.kill(killed, 21)
    resumed = made(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
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
    whole = slora(lora(), tmp_path / "whole", **options)
    whole.train()
    killed = slora(lora(), tmp_path / "killed", **options)
    runs.kill(killed, 11)
    resumed = slora(lora(), tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert same(whole.gate.state_dict(), resumed.gate.state_dict())
    assert whole.gate_log.decisions == resumed.gate_log.decisions
    assert whole.ledger.accepted_steps == resumed.ledger.accepted_steps


def test_a_checkpoint_without_the_gates_state_is_an_error(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    slora(lora(), tmp_path / "a", **options).train()
    (tmp_path / "a" / "checkpoint-5" / checkpoint.STATE).unlink()
    with pytest.raises(CheckpointError, match="gate's state is missing"):
        slora(lora(), tmp_path / "a", **options).train(resume_from_checkpoint=True)
    slora(lora(), tmp_path / "b", gate_config=None, **options).train()
    with pytest.raises(CheckpointError, match="no state of gate 'novelty'"):
        slora(lora(), tmp_path / "b", **options).train(resume_from_checkpoint=True)


# models --------------------------------------------------------------------------------------------


def peft_model(model, task):
    from peft import LoraConfig, get_peft_model

    targets = ["query", "value"] if task == "SEQ_CLS" else ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type=task))


@pytest.mark.parametrize("which", ["ours", "ours-causal", "peft", "peft-causal", "nf4", "masked", "accumulated"])
def test_slora_trainer_trains(tmp_path, which):
    language = which in ("ours-causal", "peft-causal", "nf4", "masked")
    if which == "masked":
        from transformers import BertConfig, BertForMaskedLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        model = attach(BertForMaskedLM(BertConfig(vocab_size=99, pad_token_id=0, **sizes)), "lora", rank=4, seed=0)
    elif which.startswith("peft"):
        base = runs.tiny_gemma() if language else runs.tiny_bert()
        model = peft_model(base, "CAUSAL_LM" if language else "SEQ_CLS")
    else:
        model = runs.tiny_gemma(hidden_size=64) if language else runs.tiny_bert()
        model = lora(quantize_nf4(model) if which == "nf4" else model)
    before = runs.weights(model)
    options = {"gradient_accumulation_steps": 2} if which == "accumulated" else {}
    run = slora(model, tmp_path, language=language, **options)
    run.train()
    assert run.state.global_step == run.ledger.steps == 20
    assert 4 <= run.ledger.accepted_steps < 20
    after = runs.weights(model)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert any(changed)
    assert all(p.requires_grad or not moved for p, moved in zip(model.parameters(), changed, strict=True))
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert {"gate/novelty", "gate/accept", "gate/acceptance_rate", "gate/accepted_steps", "gate/total_steps"} <= set(
        logged[-1]
    )
    assert logged[-1]["gate/accepted_steps"] == run.ledger.accepted_steps
    assert logged[-1]["gate/total_steps"] == 20


def test_peft_checkpoints_stay_pefts_own(tmp_path):
    from peft import PeftModel

    model = peft_model(runs.tiny_bert(), "SEQ_CLS")
    slora(model, tmp_path, save_strategy="steps", save_steps=20).train()
    loaded = PeftModel.from_pretrained(runs.tiny_bert(), str(tmp_path / "checkpoint-20"))
    batch = {name: value for name, value in runs.collate(list(runs.rows(4))).items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(model.eval()(**batch).logits, loaded.eval()(**batch).logits, atol=1e-6)


def test_evaluation_costs_no_training_and_changes_no_decision(tmp_path):
    often = slora(lora(), tmp_path / "a", eval_strategy="steps", eval_steps=4)
    never = slora(lora(), tmp_path / "b")
    often.train()
    never.train()
    assert len([entry for entry in often.state.log_history if "eval_loss" in entry]) == 5
    assert runs.equal(runs.weights(often.model), runs.weights(never.model))
    ledgers = [run.ledger.state_dict() | {"seconds": 0} for run in (often, never)]
    assert ledgers[0] == ledgers[1] and often.gate_log.decisions == never.gate_log.decisions


@pytest.mark.parametrize("task", [{}, {"model": "toy-decoder", "task": "toy-instruct", "rank": 4}])
def test_a_gate_works_under_bf16_autocast(task):
    import lorakit

    given = {
        "gate": "novelty",
        "gate_burn_in": 3,
        "gate_k": 16,
        "precision": "bf16",
        "budget": 5,
        "batch_size": 4,
    } | task
    quick = {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "max_test": 8, "max_validation": 8}
    assert lorakit.run(given | quick).status == "done"


def test_a_gate_goes_with_skipped_layers_and_a_four_bit_base():
    import lorakit

    given = {
        "gate": "novelty",
        "gate_burn_in": 4,
        "gate_k": 16,
        "skip": "prefix",
        "skip_share": 0.5,
        "quantize": "nf4",
        "budget": 8,
    }
    quick = {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "max_test": 8, "max_validation": 8}
    record = lorakit.run(given | quick | {"batch_size": 4})
    assert record.status == "done" and record.method == "lora+nf4+skip+slora"
    assert record.costs.accepted_steps == 8 < record.costs.steps
    assert set(record.details) == {"gate", "skip", "weights"}


def test_no_gate_config_is_the_plain_trainer(tmp_path):
    from transformers import Trainer

    ours = slora(lora(), tmp_path / "a", gate_config=None)
    ours.train()
    from lorakit.training.loss import MeanLoss

    plain = Trainer(
        lora(),
        arguments(tmp_path / "b"),
        train_dataset=runs.rows(),
        data_collator=runs.collate,
        compute_loss_func=MeanLoss("classify"),
    )
    plain.train()
    assert runs.equal(runs.weights(ours.model), runs.weights(plain.model))


# reports -------------------------------------------------------------------------------------------


def test_metrics_reach_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = slora(lora(), tmp_path, report_to="tensorboard", max_steps=8)
    run.train()
    (file,) = [path for path in tmp_path.rglob("events.out.tfevents.*")]
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    for name in ("novelty", "accept", "acceptance_rate", "accepted_steps", "total_steps"):
        assert len(events.Scalars(f"train/gate/{name}")) == 8
    assert events.Scalars("train/gate/accepted_steps")[-1].value == run.ledger.accepted_steps


def test_metrics_reach_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not a dependency of lorakit")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = slora(lora(), tmp_path, report_to="wandb", max_steps=8)
    run.train()
    import wandb

    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/gate/accepted_steps"] == run.ledger.accepted_steps


def test_a_record_keeps_what_the_gate_did(tmp_path):
    import lorakit

    given = {"gate": "novelty", "gate_rate": 0.4, "gate_burn_in": 5, "gate_m": 64, "gate_k": 8, "budget": 12}
    quick = {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "max_test": 20, "max_validation": 20}
    record = lorakit.run(given | quick | {"redundancy": 0.5, "batch_size": 4})
    gate = record.details["gate"]
    assert record.method == "slora" and record.status == "done"
    assert gate["name"] == "novelty" and gate["target_rate"] == 0.4 and gate["burn_in"] == 5
    assert gate["decisions"] == record.costs.steps and record.costs.accepted_steps == 12
    assert gate["redundant_accepted"] + gate["fresh_accepted"] == 12
    assert gate["log"][-1]["gate/accepted_steps"] == 12
    assert record.costs.flops == record.costs.flops_forward + record.costs.flops_backward + record.costs.flops_gate
    assert record.curve[-1].acceptance_rate == pytest.approx(gate["log"][-1]["gate/acceptance_rate"])


# bad input -----------------------------------------------------------------------------------------


def test_bad_input(tmp_path):
    with pytest.raises(ParameterError, match=r"gate_config=\['target'\]: unknown keys; known are m, k, target_novelty"):
        slora(lora(), tmp_path, gate_config={"target": 0.3})
    with pytest.raises(ParameterError, match="k=64"):
        slora(lora(), tmp_path, gate_config={"m": 64, "k": 64})
    with pytest.raises(ParameterError, match="gate_config"):
        SLoRATrainer(lora(), arguments(tmp_path), gate_config={}, gate=Open())
    half = arguments(tmp_path)
    half.fp16 = True
    with pytest.raises(ParameterError, match="fp16"):
        SLoRATrainer(lora(), half, train_dataset=runs.rows(), gate_config=GATE)
    from transformers import BertConfig, BertModel

    bare = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(LorakitError, match="BertModel: gates know classifiers"):
        SLoRATrainer(bare, arguments(tmp_path), gate_config=GATE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gate": "slora"}, "gate='slora': must be one of none, random"),
        ({"gate": "novelty", "precision": "fp16"}, "precision='fp16'.*gradient scaler"),
        ({"gate": "novelty", "gate_m": 100}, "gate_m=100: must be a power of two"),
        ({"gate": "novelty", "gate_k": 512}, "gate_k=512: must be below gate_m=512"),
        ({"gate": "novelty", "gate_rows": 64}, "gate_rows=64"),
        ({"gate_rate": 1.0}, "gate_rate=1.0"),
        ({"gate_beta": 0.0}, "gate_beta=0.0"),
        ({"gate_ema": 2.0}, "gate_ema=2.0"),
        ({"redundancy": 1.0}, "redundancy=1.0"),
    ],
)
def test_bad_parameters(given, message):
    import lorakit

    with pytest.raises(ParameterError, match=message):
        lorakit.run(given)


def test_a_decision_needs_no_score():
    assert Decision(True).score is None
