"""SLoRATrainer on classifiers, language models, PEFT's and 4-bit models; what it reports, and bad input."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import training_runs as runs
from slora_runs import GATE, arguments, lora, slora

import lorakit
from lorakit.adapters import load_adapter, quantize_nf4
from lorakit.errors import LorakitError, ParameterError
from lorakit.training import SLoRATrainer

# models --------------------------------------------------------------------------------------------


def peft_model(model, task):
    from peft import LoraConfig, get_peft_model

    targets = ["query", "value"] if task == "SEQ_CLS" else ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type=task))


@pytest.mark.parametrize("which", ["ours", "ours-causal", "peft", "peft-causal", "nf4", "masked", "accumulated"])
def test_slora_trainer_trains(tmp_path, which):
    language = which in ("ours-causal", "peft-causal", "nf4", "masked")
    if which == "masked":
        model = lora(runs.tiny_masked(num_hidden_layers=1))
    elif which.startswith("peft"):
        base = runs.tiny_gemma() if language else runs.tiny_bert()
        model = peft_model(base, "CAUSAL_LM" if language else "SEQ_CLS")
    else:
        model = runs.tiny_gemma(hidden_size=64) if language else runs.tiny_bert()
        model = lora(quantize_nf4(model) if which == "nf4" else model)
    before = runs.weights(model)
    options = {"gradient_accumulation_steps": 2} if which == "accumulated" else {}
    run = runs.ran(slora(model, tmp_path, language=language, **options))
    assert run.state.global_step == run.ledger.steps == 20
    assert 4 <= run.ledger.accepted_steps < 20
    after = runs.weights(model)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert any(changed)
    assert all(p.requires_grad or not moved for p, moved in zip(model.parameters(), changed, strict=True))
    last = [entry for entry in run.state.log_history if "loss" in entry][-1]
    assert {"gate/novelty", "gate/accept", "gate/acceptance_rate"} <= set(last)
    assert (last["gate/accepted_steps"], last["gate/total_steps"]) == (run.ledger.accepted_steps, 20)
    logged, points = len(run.state.log_history), len(run.gate_log.points)
    run.evaluate()  # no window of batches ends here
    assert len(run.state.log_history) == logged + 1 and len(run.gate_log.points) == points
    assert not [name for name in run.state.log_history[-1] if name.startswith("gate/")]


def test_a_model_that_needs_no_labels_counts_its_examples(tmp_path):
    class Recalls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.config = torch.nn.Linear(4, 4), SimpleNamespace()

        def forward(self, x):
            return {"loss": (self.layer(x) - x).square().mean()}

    rows = [{"x": torch.randn(4)} for _ in range(20)]
    options = {"max_steps": 4, "per_device_train_batch_size": 5}
    run = SLoRATrainer(Recalls(), arguments(tmp_path, **options), train_dataset=rows)
    before = runs.weights(run.model)
    run.train()
    assert (run.ledger.accepted_steps, run.ledger.examples) == (4, 20)
    assert not runs.equal(runs.weights(run.model), before)


def test_peft_checkpoints_stay_pefts_own(tmp_path):
    from peft import PeftModel

    model = peft_model(runs.tiny_bert(), "SEQ_CLS")
    slora(model, tmp_path, save_strategy="steps", save_steps=20).train()
    loaded = PeftModel.from_pretrained(runs.tiny_bert(), str(tmp_path / "checkpoint-20"))
    batch = {name: value for name, value in runs.collate(list(runs.rows(4))).items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(model.eval()(**batch).logits, loaded.eval()(**batch).logits, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_saved_is_opened_as_such_a_model_is(tmp_path, whole):
    model = runs.tiny_bert() if whole else lora()
    trainer = slora(model, tmp_path, max_steps=8)
    trainer.train()
    for _ in range(2):
        trainer.save_model(tmp_path / "out")
    base = type(model).from_pretrained(tmp_path / "out") if whole else runs.tiny_bert()
    again = base if whole else load_adapter(base, tmp_path / "out")
    assert runs.equal(runs.weights(again), runs.weights(trainer.model))


def test_a_resumed_run_has_the_running_statistics_of_batch_norms(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    made = torch.Generator().manual_seed(1)
    rows = [{"pixel_values": torch.randn(3, 16, 16, generator=made) + 3, "labels": n % 2} for n in range(16)]
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        options = {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2}
        model = ResNetForImageClassification(ResNetConfig(**sizes))
        run = SLoRATrainer(model, arguments(tmp_path, **{"save_strategy": "steps"} | options), train_dataset=rows)
        run.train(resume_from_checkpoint=resume)
        ends.append([value.clone() for value in run.model.state_dict().values() if value.is_floating_point()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_evaluation_costs_no_training_and_changes_no_decision(tmp_path):
    often = runs.ran(slora(lora(), tmp_path / "a", eval_strategy="steps", eval_steps=4))
    never = runs.ran(slora(lora(), tmp_path / "b"))
    assert len([entry for entry in often.state.log_history if "eval_loss" in entry]) == 5
    assert runs.equal(runs.weights(often.model), runs.weights(never.model))
    ledgers = [run.ledger.state_dict() | {"seconds": 0} for run in (often, never)]
    assert ledgers[0] == ledgers[1] and often.gate_log.decisions == never.gate_log.decisions


@pytest.mark.parametrize("task", [{}, {"model": "toy-decoder", "task": "toy-instruct", "rank": 4}])
def test_a_gate_works_under_bf16_autocast(task):
    given = {"gate": "novelty", "gate_burn_in": 3, "gate_k": 16, "precision": "bf16", "budget": 5, "batch_size": 4}
    assert lorakit.run(runs.QUICK | given | task).status == "done"


def test_a_gate_goes_with_skipped_layers_and_a_four_bit_base():
    given = {"gate": "novelty", "gate_burn_in": 4, "gate_k": 16, "skip": "prefix", "skip_share": 0.5}
    record = lorakit.run(runs.QUICK | given | {"quantize": "nf4", "budget": 8, "batch_size": 4})
    assert record.status == "done" and record.method == "lora+nf4+skip+slora"
    assert record.costs.accepted_steps == 8 < record.costs.steps
    assert set(record.details) == {"gate", "skip", "weights"}


def test_no_gate_config_is_the_plain_trainer(tmp_path):
    ours = runs.ran(slora(lora(), tmp_path / "a", gate_config=None))
    plain = runs.ran(runs.plain(lora(), arguments(tmp_path / "b")))
    assert runs.equal(runs.weights(ours.model), runs.weights(plain.model))


# reports -------------------------------------------------------------------------------------------


GATE_NAMES = [f"gate/{name}" for name in ("novelty", "accept", "acceptance_rate", "accepted_steps", "total_steps")]
SPENT = ["flops", "tokens", "tokens_backpropagated", "accepted_steps"]


def test_metrics_reach_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = runs.ran(slora(lora(), tmp_path, report_to="tensorboard", max_steps=8))
    (file,) = [path for path in tmp_path.rglob("events.out.tfevents.*")]
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    assert {len(events.Scalars(name)) for name in GATE_NAMES} == {8}
    assert events.Scalars("gate/accepted_steps")[-1].value == run.ledger.accepted_steps
    assert events.Scalars("flops")[-1].value == pytest.approx(run.ledger.flops)


@pytest.mark.parametrize("gate", [True, False])
def test_metrics_reach_wandb_offline(tmp_path, monkeypatch, gate):
    wandb = pytest.importorskip("wandb", reason="needs the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    given = {} if gate else {"gate_config": None}
    try:
        run = runs.ran(slora(lora(), tmp_path, report_to="wandb", max_steps=8, **given))
        offline, summary = wandb.run.offline, dict(wandb.run.summary)
    finally:
        wandb.finish()
    assert offline and {"train/loss", "train/learning_rate", *SPENT} <= summary.keys()
    assert [name for name in GATE_NAMES if name in summary] == (GATE_NAMES if gate else [])
    assert {name: summary[name] for name in SPENT} == {name: getattr(run.ledger, name) for name in SPENT}
    assert not [name for name in summary if "total_flos" in name]


def test_a_record_keeps_what_the_gate_did():
    given = {"gate": "novelty", "gate_rate": 0.4, "gate_burn_in": 5, "gate_m": 64, "gate_k": 8, "budget": 12}
    record = lorakit.run(runs.QUICK | given | {"redundancy": 0.5, "batch_size": 4})
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
    args, half = arguments(tmp_path), arguments(tmp_path)
    half.fp16 = True
    for given, says in (
        ((lora(), args, {"target": 0.3}), r"gate_config=\['target'\]: unknown keys; known are m, k, target_novelty"),
        ((lora(), args, {"m": 64, "k": 64}), "k=64"),
        ((lora(), args, {}, runs.Open()), "gate_config"),
        ((lora(), half, GATE), "fp16"),
    ):
        model, chosen, config, *gate = given
        with pytest.raises(ParameterError, match=says):
            SLoRATrainer(model, chosen, gate_config=config, gate=gate[0] if gate else None)
    with pytest.raises(LorakitError, match="BertModel: a gate by head gradients needs a classifier"):
        SLoRATrainer(runs.tiny_bert().bert, args, gate_config=GATE)
