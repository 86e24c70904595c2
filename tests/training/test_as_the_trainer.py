"""What a script for the plain Trainer asks for, SLoRATrainer and FLoRATrainer do as it does."""

from __future__ import annotations

import functools

import pytest
import torch
import training_runs as runs
from flora_runs import decoder, flora, ledger
from slora_runs import arguments, lora, slora
from transformers import Trainer

from lorakit.errors import LorakitError
from lorakit.training import Budget, BudgetTrainer, FLoRATrainer, SLoRATrainer


def peft_model():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(runs.tiny_bert(), LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))


def trained(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])


# the best model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "build", "greater"),
    [(slora, lora, False), (slora, peft_model, False), (slora, runs.tiny_bert, False), (flora, decoder, True)],
    ids=["ours", "peft", "full", "flora"],
)
def test_the_best_weights_are_there_at_the_end(tmp_path, made, build, greater):
    """Which is best the Trainer says; each step is saved, so the weights at each are known."""
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": greater}
    run = made(build(), tmp_path, **every | best | {"learning_rate": 0.3})
    seen, save = {}, run._save_checkpoint
    run._save_checkpoint = lambda *given: (seen.update({run.state.global_step: trained(run)}), save(*given))
    run.train()
    assert run.state.best_global_step not in (None, 5)
    assert torch.equal(trained(run), seen[run.state.best_global_step])
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)


# evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unlabelled", [[], [0], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("tokens", [False, True])
def test_an_evaluation_batch_without_a_label_is_left_out(tmp_path, unlabelled, tokens):
    """As the plain Trainer, whose own loss of such a batch is NaN, leaves it out."""
    rows = runs.language_rows(24, seed=1).map(
        lambda row, i: {"labels": [-100] * len(row["labels"])} if i // 8 in unlabelled else row, with_indices=True
    )
    options = {"per_device_eval_batch_size": 8}
    run = flora(decoder(), tmp_path, **options) if tokens else slora(decoder(), tmp_path, language=True, **options)
    plain = Trainer(decoder(), arguments(tmp_path, **options), data_collator=runs.collate_language)
    found, expected = (trainer.evaluate(rows)["eval_loss"] for trainer in (run, plain))
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)


# the loss -------------------------------------------------------------------------------------------


def weighted(logits, labels, vocab_size, **_):
    """A loss function of one's own."""
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    weight = torch.linspace(0.5, 2.0, vocab_size)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), shifted, weight=weight)


def own_function():
    model = decoder()
    model.loss_function = weighted
    return model


def experts(**options):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    routed = {"num_key_value_heads": 1, "intermediate_size": 64, "num_local_experts": 4, "pad_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(**sizes | routed | options))


def with_routers():
    return experts(output_router_logits=True)


def regression():
    return lora(runs.tiny_bert(num_labels=1))


def several_labels():
    return lora(runs.tiny_bert(num_labels=3, problem_type="multi_label_classification"))


def relabelled(collate, label):
    def made(batch):
        inputs = collate(batch)
        return inputs | {"labels": torch.stack([label(row) for row in inputs["input_ids"]])}

    return made


AMOUNT = relabelled(runs.collate, lambda ids: ids[0] / 50)
SETS = relabelled(runs.collate, lambda ids: (ids[:3] % 2).float())
LOSSES = {
    "function": (own_function, runs.collate_language, {}),
    "routers": (with_routers, runs.collate_language, {}),
    "smoothed": (decoder, runs.collate_language, {"label_smoothing_factor": 0.2}),
    "smoothed function": (own_function, runs.collate_language, {"label_smoothing_factor": 0.2}),
    "smoothed classes": (lora, runs.collate, {"label_smoothing_factor": 0.2}),
    "one label": (regression, AMOUNT, {}),
    "several labels": (several_labels, SETS, {}),
    "cross-entropy": (decoder, runs.collate_language, {}),
}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def on(trainer, name, folder, **options):
    """A trainer of that class on one of LOSSES."""
    model, collate, given = (LOSSES | WHOLE)[name]
    given = given | SGD | {key: options.pop(key) for key in list(options) if hasattr(arguments(folder), key)}
    rows = runs.language_rows if collate is runs.collate_language else runs.rows
    data = {"train_dataset": rows(), "eval_dataset": rows(16, seed=1), "data_collator": collate}
    return trainer(model=model(), args=arguments(folder, **given), **data, **options)


def assert_same_step(ours, plain, untrained):
    """Weights moved alike, and losses logged and evaluated are the same."""
    moved = [trained(run) - trained(untrained) for run in (ours, plain)]
    assert moved[1].norm() > 1e-4
    assert (moved[0] - moved[1]).norm() < 1e-4 * moved[1].norm()
    logged = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (ours, plain)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("gate", [None, runs.Open()], ids=["ungated", "gated"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_one_that_was_asked_for(tmp_path, name, gate):
    ours, plain = on(SLoRATrainer, name, tmp_path, gate=gate), on(Trainer, name, tmp_path)
    for run in (ours, plain):
        run.train()
    assert_same_step(ours, plain, on(Trainer, name, tmp_path))


@pytest.mark.parametrize("name", ["routers", "smoothed", "one label", "several labels"])
def test_a_window_steps_as_its_rows_in_one_batch(tmp_path, name):
    """For losses that are means over rows of equal weight; the plain Trainer's own losses grow with the window."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ours, whole = on(SLoRATrainer, name, tmp_path, **sizes), on(SLoRATrainer, name, tmp_path)
    for run in (ours, whole):
        run.train()
    start = trained(on(Trainer, name, tmp_path))
    moved = [trained(run) - start for run in (ours, whole)]
    # the balance of the routers in parts is not that of the whole
    tolerance = 0.1 if name == "routers" else 1e-4
    assert (moved[0] - moved[1]).norm() < tolerance * moved[1].norm()


class Doubled:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = 2 * outputs.loss
        return (loss, outputs) if return_outputs else loss


class Halved:
    def compute_loss(self, model, inputs, return_outputs=False, **options):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        return (loss / 2, outputs) if return_outputs else loss / 2


@pytest.mark.parametrize("gate", [None, runs.Open()], ids=["ungated", "gated"])
@pytest.mark.parametrize("mixin", [Doubled, Halved])
@pytest.mark.parametrize("name", ["cross-entropy", "function"])
def test_an_overridden_compute_loss_is_the_loss(tmp_path, name, mixin, gate):
    made = [type("Mine", (mixin, base), {}) for base in (SLoRATrainer, Trainer)]
    windows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    ours, plain = on(made[0], name, tmp_path, gate=gate, **windows), on(made[1], name, tmp_path, **windows)
    for run in (ours, plain):
        run.train()
    assert ours.ledger.flops_forward > 0 and ours.ledger.accepted_steps == 3
    assert_same_step(ours, plain, on(Trainer, name, tmp_path))


CHOOSING = {"gating": {"method": "random"}}
WHOLE = {"one whole label": (regression, runs.collate, {})}
REFUSED = [
    ("function", FLoRATrainer, CHOOSING, "own loss.*loss_function, router losses"),
    ("routers", FLoRATrainer, CHOOSING, "own loss.*loss_function, router losses"),
    ("smoothed", FLoRATrainer, CHOOSING, "^label_smoothing_factor=0.2: "),
    (
        "cross-entropy",
        FLoRATrainer,
        CHOOSING | {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.mean()},
        "^compute_loss_func=",
    ),
    ("cross-entropy", type("Mine", (Doubled, FLoRATrainer), {}), CHOOSING, "^compute_loss='Mine': "),
    (
        "one label",
        functools.partial(BudgetTrainer, kind="classify", budget=Budget(3, "steps")),
        {},
        "^labels=torch.flo",
    ),
    (
        "one label",
        SLoRATrainer,
        {"gate_config": {"m": 64, "k": 8, "burn_in": 1}},
        "^labels=torch.float32: gate 'novelty'",
    ),
    (
        "one whole label",
        SLoRATrainer,
        {"gate_config": {"m": 64, "k": 8, "burn_in": 1}},
        "^labels=torch.int64: gate 'novelty'",
    ),
    (
        "several labels",
        SLoRATrainer,
        {"gate_config": {"m": 64, "k": 8, "burn_in": 1}},
        "^labels=torch.float32: gate 'novelty'",
    ),
]


@pytest.mark.filterwarnings("ignore::lorakit.gates.log.GateWarning")
@pytest.mark.parametrize(("name", "trainer", "options", "message"), REFUSED)
def test_a_loss_that_cannot_be_served_is_refused_by_name(tmp_path, name, trainer, options, message):
    with pytest.raises(LorakitError, match=message):
        run = on(trainer, name, tmp_path, **options)
        before = trained(run)
        try:
            run.train()
        finally:
            assert torch.equal(trained(run), before) and not list(tmp_path.iterdir())


# one run after another ------------------------------------------------------------------------------


def interrupted(run, at: int, error: Exception) -> None:
    """Let its micro-batch number `at` fail."""
    step, count = run.training_step, iter(range(1, 10**6))

    def failing(*given):
        if next(count) == at:
            raise error
        return step(*given)

    run.training_step = failing


GATES = {"ungated": lambda: None, "gated": runs.Open}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [False, True], ids=["all", "chosen"])
def test_smaller_batches_after_memory_ran_out_begin_anew(tmp_path, gate, tokens):
    """Memory runs out in the second micro-batch of a window of two; it goes on with batches of 7 instead of 8."""
    made = []
    for size in (8, 7):
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": size, "auto_find_batch_size": True}
        options |= {"train_sampling_strategy": "sequential", "gate": GATES[gate]()}
        kind = {"gating": {"method": "flora", "score": "loss"}} if tokens else {}
        run = on(FLoRATrainer if tokens else SLoRATrainer, "cross-entropy", tmp_path / str(size), **kind, **options)
        if size == 8:
            interrupted(run, 2, RuntimeError("CUDA out of memory. Tried to allocate"))
        run.train()
        made.append(run)
    assert torch.equal(*map(trained, made))
    first, second = (ledger(run) for run in made)
    assert first == second and first["examples"] == 3 * 2 * 7


def test_smaller_batches_of_a_resumed_run_begin_at_its_checkpoint(tmp_path):
    """Memory runs out after a step that the checkpoint does not hold, of which nothing may be left."""
    common = {"train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 1, "gate": runs.Open()}
    whole = on(SLoRATrainer, "cross-entropy", tmp_path / "run", per_device_train_batch_size=8, **common)
    whole.train()
    made = []
    for size in (8, 7):
        options = common | {"save_strategy": "no", "per_device_train_batch_size": size}
        run = on(SLoRATrainer, "cross-entropy", tmp_path / "run", auto_find_batch_size=size == 8, **options)
        if size == 8:
            interrupted(run, 2, RuntimeError("CUDA out of memory. Tried to allocate"))
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        made.append(run)
    assert torch.equal(*map(trained, made)) and ledger(made[0]) == ledger(made[1])
    assert made[0].ledger.examples == 8 + 2 * 7


def test_a_budget_is_spent_again_by_the_next_call(tmp_path):
    run = runs.trainer(lora(), tmp_path, budget=Budget(4, "steps"))
    interrupted(run, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    for _ in range(2):
        before = trained(run)
        run.train()
        assert run.ledger.steps == 4 and run.ledger.examples == 4 * 2 * 8
        assert [point.step for point in run.curve.points] == [1, 2, 3, 4]
        assert not torch.equal(trained(run), before)
