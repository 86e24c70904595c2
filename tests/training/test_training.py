"""The trainer: bitwise the plain Trainer's weights, budgets that end decayed, gates without traces, bitwise resume."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_runs import Alternating, Closed, equal, killed_and_resumed, near, plain, ran, tiny_bert, trainer, weights
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from lorakit.adapters import attach, detach
from lorakit.errors import CheckpointError, ParameterError
from lorakit.params import Params
from lorakit.runs.assembly import Assembled
from lorakit.training import Budget, Diverged, Ledger, Schedule, checkpoint
from lorakit.training.arguments import training_arguments
from lorakit.training.loss import example_statistics


def model(**options):
    """The same tiny BERT, with dropout, at every call."""
    return tiny_bert(**{"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1} | options)


@pytest.mark.parametrize(
    ("params", "own_loss", "same"),
    [({"gradient_accumulation": 2, "learning_rate": 1e-2}, False, equal),
     ({"gradient_accumulation": 1, "optimizer": "sgd", "learning_rate": 0.1}, True, near)],
)  # fmt: skip
def test_accepting_everything_is_the_plain_trainer(tmp_path, params, own_loss, same):
    """Bitwise with the mean loss; but for rounding with the model's own."""
    ours = ran(trainer(model(), tmp_path / "ours", schedule=Schedule("constant"), params=params))
    arguments = training_arguments(Params(batch_size=8, seed=3, **params), str(tmp_path / "plain"))
    arguments.max_steps, arguments.lr_scheduler_type = 20, "constant"
    theirs = ran(plain(model(), arguments, own_loss=own_loss))
    assert same(weights(ours.model), weights(theirs.model))


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    params = {"optimizer": "sgd", "learning_rate": 0.1}
    made = []
    for batch_size, accumulation in ((16, 1), (8, 2), (4, 4)):
        changed = params | {"batch_size": batch_size, "gradient_accumulation": accumulation}
        # 9 steps: past the end of the epoch, whose last step is smaller
        run = ran(trainer(tiny_bert(), tmp_path / str(accumulation), budget=Budget(9, "steps"), params=changed))
        made.append((weights(run.model), [point.train_loss for point in run.curve.points]))
    for other, losses in made[1:]:
        assert losses == pytest.approx(made[0][1], rel=1e-5)
        assert near(made[0][0], other)


def test_rejecting_everything_changes_no_weight_and_no_moment(tmp_path):
    before = weights(model())
    run = ran(trainer(model(), tmp_path, gate=Closed(), params={"weight_decay": 0.1}))
    assert equal(before, weights(run.model))
    assert run.optimizer.state_dict()["state"] == {}
    assert (run.ledger.steps, run.ledger.accepted_steps, run.ledger.flops_backward) == (20, 0, 0)
    assert run.ledger.tokens > 0 and run.ledger.tokens_backpropagated == 0


@pytest.mark.parametrize("unit", ["steps", "accepted_steps", "tokens", "flops"])
def test_budget_ends_the_run_with_the_step_that_spends_it(tmp_path, unit):
    amount = {"steps": 12, "accepted_steps": 12, "tokens": 1500, "flops": 2e8}[unit]
    run = ran(trainer(model(), tmp_path, budget=Budget(amount, unit), evaluations=3))
    shares = [getattr(point, unit if unit != "steps" else "step") / amount for point in run.curve.points]
    assert shares[-1] >= 1 and all(share < 1 for share in shares[:-1])
    assert sum(point.validation is not None for point in run.curve.points) == 3
    assert run.curve.points[-1].validation is not None


def test_learning_rate_follows_the_share_of_the_budget(tmp_path):
    run = ran(trainer(model(), tmp_path, budget=Budget(20, "steps"), schedule=Schedule("linear", warmup=0.2)))
    rates = [point.learning_rate / 1e-2 for point in run.curve.points]
    expected = [0.1 + 0.9 * i / 4 if i < 4 else 1 - (i - 4) / 16 for i in range(20)]
    assert rates == pytest.approx(expected, abs=1e-9)
    assert run.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)


def test_gate_halves_the_steps_without_accumulation(tmp_path):
    options = {"budget": Budget(10, "accepted_steps"), "params": {"gradient_accumulation": 1}}
    run = ran(trainer(model(), tmp_path, gate=Alternating(), **options))
    assert run.ledger.accepted_steps == 10 and run.ledger.steps == 19
    assert run.curve.points[-1].gate_score == 18.5  # batches 18 (rejected) and 19, since the last point


def test_ledger_counts_what_was_seen(tmp_path):
    # 100 rows: 13 batches
    run = ran(trainer(model(), tmp_path, budget=Budget(7, "steps"), params={"gradient_accumulation": 1}))
    assert run.ledger.examples == 56
    order = [row for batch in list(run.get_train_dataloader())[:7] for row in batch["attention_mask"]]
    assert run.ledger.tokens == sum(int(mask.sum()) for mask in order)


def test_evaluation_leaves_training_alone(tmp_path):
    often = ran(trainer(model(), tmp_path / "a", evaluations=10))
    once = ran(trainer(model(), tmp_path / "b", evaluations=1))
    assert equal(weights(often.model), weights(once.model))


# micro-batches: inside steps, epochs and past checkpoints
@pytest.mark.parametrize("killed_after", [13, 15, 26, 27, 37])
@pytest.mark.parametrize("grouped", [False, True])
def test_resume_is_bitwise(tmp_path, killed_after, grouped):
    def made(name):
        options = {"evaluations": 4, "save_steps": 3, "params": {"group_by_length": grouped}}
        return trainer(model(), tmp_path / name, gate=Alternating(), **options)

    whole, resumed = killed_and_resumed(made, killed_after)
    assert equal(weights(whole.model), weights(resumed.model))
    moments = [run.optimizer.state_dict()["state"] for run in (whole, resumed)]
    assert all(equal(list(a.values()), list(b.values())) for a, b in zip(*map(dict.values, moments), strict=True))
    assert resumed.gate.seen == whole.gate.seen == 20  # one decision a step, over its whole window
    without_time = [[point.model_dump(exclude={"seconds"}) for point in run.curve.points] for run in (whole, resumed)]
    assert without_time[0] == without_time[1]


def test_resuming_what_had_spent_its_budget_takes_no_further_step(tmp_path):
    first = ran(trainer(model(), tmp_path, save_steps=20))
    again = ran(trainer(model(), tmp_path, save_steps=20), resume_from_checkpoint=True)
    assert again.ledger.steps == 20 and again.curve.points == first.curve.points
    assert equal(weights(first.model), weights(again.model))


def test_resuming_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer(model(), tmp_path).train(resume_from_checkpoint=True)


def test_checkpoint_cut_short_is_passed_over(tmp_path):
    trainer(model(), tmp_path, save_steps=6).train()
    (checkpoint.folder(tmp_path, 20) / checkpoint.RUN).unlink()
    before = sorted(tmp_path.rglob("*"))
    assert checkpoint.complete(tmp_path)[-1] == checkpoint.folder(tmp_path, 18)
    assert sorted(tmp_path.rglob("*")) == before
    trainer(model(), tmp_path, save_steps=6).train(resume_from_checkpoint=True)
    assert (checkpoint.folder(tmp_path, 20) / checkpoint.RUN).is_file()


def test_what_is_not_ours_is_never_deleted(tmp_path):
    """A Hugging Face Trainer's checkpoint, and a file, a link and a folder that are only called like one."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "optimizer.pt").write_bytes(b"theirs")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "checkpoint-8").symlink_to(tmp_path / "checkpoint-best")
    before = sorted(tmp_path.iterdir())
    assert checkpoint.complete(tmp_path) == []
    trainer(model(), tmp_path).train()
    with pytest.raises(ParameterError, match="checkpoint-500, which lorakit did not write"):
        trainer(model(), tmp_path, save_steps=6).train()
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_removes_only_its_own_older_checkpoints(tmp_path):
    trainer(model(), tmp_path, save_steps=20, identity={"seed": 1}).train()
    (tmp_path / "checkpoint-20").rename(tmp_path / "checkpoint-5")
    trainer(model(), tmp_path, save_steps=6, identity={"seed": 2}).train()
    assert {path.name for path in checkpoint.complete(tmp_path)} == {"checkpoint-18", "checkpoint-20"}
    assert [path.name for path in checkpoint.complete(tmp_path / "earlier-1")] == ["checkpoint-5"]  # put away


def test_a_checkpoint_of_another_run_or_without_its_state_is_refused(tmp_path):
    trainer(model(), tmp_path, save_steps=20, identity={"learning_rate": 0.01, "seed": 3}).train()
    kept = checkpoint.complete(tmp_path)[-1]
    other = trainer(model(), tmp_path, identity={"learning_rate": 0.02, "seed": 3})
    wider = trainer(model(intermediate_size=128), tmp_path, identity={"learning_rate": 0.01, "seed": 3})
    for run, says in ((other, "learning_rate=0.01 there, 0.02 here"), (wider, r"\(64, 32\), here \(128, 32\)")):
        with pytest.raises(CheckpointError, match=says):
            run.train(resume_from_checkpoint=str(kept))
    (kept / checkpoint.STATE).unlink()
    with pytest.raises(CheckpointError, match="gate.pt"):
        trainer(model(), tmp_path).train(resume_from_checkpoint=str(kept))


def test_checkpoint_holds_only_what_is_trained(tmp_path):
    only_head = model()
    only_head.bert.requires_grad_(False)
    trainer(only_head, tmp_path, save_steps=20).train()
    stored = load_file(str(checkpoint.complete(tmp_path)[-1] / checkpoint.WEIGHTS))
    assert set(stored) == {"classifier.weight", "classifier.bias"}


def test_best_weights_are_those_of_the_lowest_validation_loss(tmp_path):
    run = ran(trainer(model(), tmp_path, evaluations=10, keep_best=True, params={"learning_rate": 0.05}))
    losses = {point.step: point.validation["loss"] for point in run.curve.points if point.validation}
    run.curve.restore_best(run.model)
    assert run.curve.chosen().step == min(losses, key=losses.get)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-6)


def test_training_again_begins_again(tmp_path):
    run = ran(trainer(model(), tmp_path, budget=Budget(4, "steps"), evaluations=2))
    once = (run.ledger.steps, run.ledger.tokens, [point.step for point in run.curve.points])
    run.train()
    assert (run.ledger.steps, run.ledger.tokens, [point.step for point in run.curve.points]) == once


@pytest.mark.parametrize("quantised", [None, False, True])
@pytest.mark.parametrize("method", ["lora", "head"])
def test_only_a_quantised_model_is_shown_to_the_trainer_as_adapted(tmp_path, method, quantised):
    """An adapted one for good, so that the plain Trainer takes it; one whose head is trained while ours is made."""
    bare = tiny_bert()
    if quantised is not None:
        bare.is_quantized = quantised
        bare.hf_quantizer = type("Quantizer", (), {"is_trainable": True})()
    adapted = attach(bare, method)
    assert getattr(adapted, "_hf_peft_config_loaded", False) == (bool(quantised) and method == "lora")
    trainer(adapted, tmp_path)
    assert getattr(adapted, "_hf_peft_config_loaded", False) == (bool(quantised) and method == "lora")
    assert not detach(adapted)._hf_peft_config_loaded


def test_no_weights_are_copied_unless_the_best_are_asked_for(tmp_path):
    curve = ran(trainer(model(), tmp_path, evaluations=2)).curve
    assert (curve.best, curve.best_step) == ({}, None)
    assert curve.chosen() is curve.points[-1]


def test_nan_loss_is_diverged_not_a_number(tmp_path):
    broken = model()
    with torch.no_grad():
        broken.classifier.bias.fill_(math.nan)
    with pytest.raises(Diverged, match="training loss is nan at step 1"):
        trainer(broken, tmp_path).train()


def test_a_validation_loss_that_is_no_number_is_diverged_too(tmp_path):
    broken = model()
    broken.classifier.register_forward_hook(lambda head, _, out: out if head.training else out * math.nan)
    with pytest.raises(Diverged, match="validation loss is nan at step 10"):
        trainer(broken, tmp_path, budget=Budget(20, "steps"), evaluations=2).train()


def test_bf16_autocast_and_gradient_checkpointing_still_learn(tmp_path):
    saving = {"precision": "bf16", "gradient_checkpointing": True}
    runs = [trainer(model(), tmp_path / name, budget=Budget(30, "steps"), params=params)
            for name, params in (("plain", {}), ("saving", saving))]  # fmt: skip
    plain, saving = map(ran, runs)
    assert saving.curve.points[-1].train_loss == pytest.approx(plain.curve.points[-1].train_loss, abs=0.1)
    assert saving.ledger.flops_backward > plain.ledger.flops_backward  # the recomputation is counted


def test_checkpointing_changes_no_gradient(tmp_path):
    found = []
    for on in (False, True):  # SGD: Adam would blow rounding of tiny gradients up to whole steps
        params = {"optimizer": "sgd", "learning_rate": 0.1, "gradient_checkpointing": on}
        found.append(ran(trainer(model(), tmp_path / str(on), budget=Budget(5, "steps"), params=params)).model)
    assert near(*map(weights, found))


def test_tensorboard_gets_the_suites_axes_of_a_run_without_a_gate(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    run = trainer(model(), tmp_path, params={"report_to": "tensorboard", "run_dir": str(tmp_path)})
    returned = run.train().metrics
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/accuracy"} <= tags
    for name in ("flops", "tokens", "tokens_backpropagated", "accepted_steps"):
        assert events.Scalars(name)[-1].value == pytest.approx(getattr(run.ledger, name))
        assert len({point.step for point in events.Scalars(name)}) == len(run.curve.points)
    assert not [name for name in (*tags, *returned, *run.state.log_history) if "total_flos" in name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"precision": "fp16"}, "precision='fp16'"), ({"report_to": "tensorboard"}, "run_dir=''"),
     ({"optimizer": "adamm"}, "optimizer='adamm': there is no optimizer of this name; there are adamw_torch, "),
     ({"optimizer": "galore_adamw"}, "optimizer='galore_adamw': .*; there are adamw_torch, "),
     ({"optimizer": "adamw_anyprecision"}, "optimizer='adamw_anyprecision': .*; there are adamw_torch, "),
     ({"report_to": "tensorbord", "run_dir": "r"}, "report_to='tensorbord': must be none or, .*tensorboard"),
     ({"report_to": "tensorboard, tb", "run_dir": "r"}, "report_to='tensorboard, tb': must be none or, .*tensorboard")],
)  # fmt: skip
def test_what_this_machine_cannot_do_is_refused_by_name(changed, message, tmp_path):
    if torch.cuda.is_available() and "precision" in changed:
        pytest.skip("this machine can")
    with pytest.raises(ParameterError, match=message):
        training_arguments(Params(**changed), str(tmp_path))


@pytest.mark.parametrize("waited", ["0", "-1", "1.5", "soon", "1000000000"])
def test_a_time_to_wait_that_is_none_is_refused_by_name(monkeypatch, tmp_path, waited):
    monkeypatch.setenv("LORAKIT_TIMEOUT", waited)
    with pytest.raises(ParameterError, match=f"LORAKIT_TIMEOUT='{waited}': seconds to wait"):
        training_arguments(Params(), str(tmp_path))


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_an_optimizer_is_named_as_usable_exactly_where_the_trainer_builds_it(name, tmp_path):
    plain = TrainingArguments(str(tmp_path), optim=name, report_to="none", use_cpu=not torch.cuda.is_available())
    try:
        Trainer(model().float(), plain).create_optimizer()
        built = True
    except (ImportError, ValueError, RuntimeError):
        built = False
    with nullcontext() if built else pytest.raises(ParameterError, match=f"optimizer='{name}'"):
        assert training_arguments(Params(optimizer=name), str(tmp_path)).optim == name


def test_a_gpu_without_bf16_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lorakit.training.arguments.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ParameterError, match="precision='bf16': this GPU has no bf16; use fp32 or fp16"):
        training_arguments(Params(precision="bf16"), str(tmp_path))


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_weights_in_shards_are_refused_by_name(monkeypatch, tmp_path, name):
    prepared = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        prepared(self)
        setattr(self, f"is_{name}_enabled", True)  # which needs several GPUs

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ParameterError, match=rf"distributed_type=\['{name}'\]: weights in shards"):
        trainer(model(), tmp_path)


def test_tf32_falls_back_with_a_note(monkeypatch, tmp_path):
    for module in ("training.arguments", "runs.assembly"):
        monkeypatch.setattr(f"lorakit.{module}.is_torch_tf32_available", lambda: False)
    assert not training_arguments(Params(tf32=True), str(tmp_path)).tf32
    silent = SimpleNamespace(notes=[])
    made = [Assembled(Params(tf32=asked), model(), None, silent, silent, None) for asked in (True, False)]
    assert made[0].notes == ["tf32: not on this device; float32 is whole"] and made[1].notes == []


@pytest.mark.parametrize(
    ("given", "message"),
    [({"budget": 0}, "^budget=0: "), ({"budget_unit": "hours"}, "budget_unit='hours'.*accepted_steps"),
     ({"schedule": "step"}, "schedule='step'.*linear"), ({"warmup": 1.0}, "warmup=1.0"), ({"warmup": -0.1}, "warmup=")],
)  # fmt: skip
def test_bad_budgets_and_schedules(given, message):
    with pytest.raises(ParameterError, match=message):
        Params(**given)


def test_cosine_schedule_is_the_closed_form():
    schedule = Schedule("cosine")
    for share in (0.0, 0.25, 0.5, 1.0, 1.2):
        assert schedule.factor(share) == pytest.approx(0.5 * (1 + math.cos(math.pi * min(share, 1))))


def test_ledger_sums_over_ranks_and_survives_json():
    ledger = Ledger()
    ledger.add(tokens=5, accepted=1, loss=2.0)
    ledger.commit(lambda vector: 2 * vector)  # as two ranks would
    assert (ledger.tokens, ledger.accepted_steps, ledger.steps) == (10, 1, 1)
    restored = Ledger()
    restored.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert restored.state_dict() == ledger.state_dict()


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_statistics_equal_the_models_own_loss(kind, tiny_gemma):
    torch.manual_seed(1)
    ids = torch.randint(1, 99, (3, 12))
    labels = ids.masked_fill(torch.rand(3, 12) < 0.3, -100)
    model = tiny_gemma()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        expected = model(input_ids=ids, labels=labels).loss
    if kind == "masked":
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    statistics = example_statistics(logits, labels, kind)
    assert float(statistics[:, 0].sum() / statistics[:, 1].sum()) == pytest.approx(float(expected), rel=1e-5)
    shifted = labels[:, 1:] if kind == "causal" else labels
    assert statistics[:, 1].tolist() == (shifted != -100).sum(1).tolist()


def test_classification_statistics():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    statistics = example_statistics(logits, torch.tensor([0, 0]), "classify")
    expected = [[math.log(1 + math.exp(-2)), 1, 0, 0], [math.log(1 + math.e), 1, 1, 0]]
    assert torch.allclose(statistics, torch.tensor(expected, dtype=torch.float64), atol=1e-6)
