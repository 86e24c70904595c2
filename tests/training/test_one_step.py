"""One step by hand: what the gate is shown, what passes cost, who decides, and what a budget's trainer is made of."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from flora_runs import arguments, budgeted, decoder
from slora_runs import lora
from torch import nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lorakit.errors import ParameterError
from lorakit.gates import build_gate
from lorakit.measure.flops import FlopCount
from lorakit.params import Params
from lorakit.seams import Candidate, Decision
from lorakit.training import Budget, BudgetTrainer, Ledger, SLoRATrainer
from lorakit.training.arguments import training_arguments
from lorakit.training.gated import GatedTrainer
from lorakit.training.slora import made_model
from lorakit.training.trainer import mean_loss


class Shown(runs.Open):
    """Keeps what it is shown."""

    needs_hidden = True

    def __init__(self):
        self.seen = []

    def measure(self, candidate):
        self.seen.append(candidate)
        return super().measure(candidate)


class Doubled:
    loss_is_scaled_for_ga = False  # the Trainer divides it by the batches of the step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


@pytest.mark.parametrize("doubled", [False, True])
def test_the_gate_is_shown_the_batch_and_each_pass_is_counted(tmp_path, doubled):
    """Against the model itself, of which two micro-batches make the step: the mean over the labels of both."""
    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    data = {"train_dataset": runs.language_rows(), "data_collator": runs.collate_language}
    trainer = type("Mine", (Doubled, SLoRATrainer), {}) if doubled else SLoRATrainer
    gate, twin = Shown(), decoder(final_logit_softcapping=2.0)
    run = trainer(decoder(final_logit_softcapping=2.0), arguments(tmp_path, **options), gate=gate, **data)
    run.train()
    given = []
    twin.lm_head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    batches = [runs.collate_language([runs.language_rows()[8 * i + j] for j in range(8)]) for i in range(2)]
    labelled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    flops = {"forward": 0, "backward": 0}
    for seen, batch in zip(gate.seen, batches, strict=True):
        with FlopCount() as count:
            outputs = twin(**batch)
        flops["forward"] += count.total
        shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
        losses = F.cross_entropy(outputs.logits.flatten(0, 1), shifted, reduction="none")
        loss = outputs.loss if doubled else losses.sum() / labelled
        with FlopCount() as count:
            loss.backward()
        flops["backward"] += count.total
        torch.testing.assert_close(seen.loss, loss.detach(), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(seen.logits, outputs.logits.detach())
        torch.testing.assert_close(seen.hidden, given[-1].detach())
        assert torch.equal(seen.labels, batch["labels"]) and (seen.kind, seen.softcap) == ("causal", 2.0)
        assert seen.targets == int((shifted != -100).sum())
        assert seen.token_losses is None if doubled else torch.allclose(seen.token_losses, losses, atol=1e-5)
        assert not any(tensor.requires_grad for tensor in (seen.loss, seen.logits, seen.hidden))
    assert (run.ledger.flops_forward, run.ledger.flops_backward) == (flops["forward"], flops["backward"])
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert run.ledger.tokens == run.ledger.tokens_backpropagated == tokens


def test_a_gate_that_looks_on_costs_what_its_formula_says(tmp_path):
    """Each row's first token is a label that nothing predicts."""
    rows, model = runs.language_rows(8).map(lambda row: {"labels": row["input_ids"]}), decoder()
    gate = build_gate(runs.batch_gate("novelty", burn_in=1, m=64, k=8, topk=16), model, "causal")
    options = {"data": rows, "gate": gate, "params": {"gradient_accumulation": 1}, "budget": 2}
    run = runs.ran(budgeted(model, tmp_path, {"method": "random"}, **options))
    labels = runs.collate_language(list(rows))["labels"]
    seen = Candidate(torch.zeros(()), None, labels, kind="causal")
    assert run.ledger.flops_gate == 2 * (gate.flops(seen) + run.tokens.score.flops(seen.targets, True)) > 0


def test_the_models_own_loss_is_asked_for_once_and_without_a_gate_nothing_is_logged_of_one(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("lorakit.training.loss.is_mean_loss", lambda *given: asked.append(given) or True)
    data = {"train_dataset": runs.rows(), "data_collator": runs.collate}
    run = runs.ran(SLoRATrainer(lora(), arguments(tmp_path, max_steps=2), **data))
    assert len(asked) == 1
    assert not [name for entry in run.state.log_history for name in entry if name.startswith("gate/")]
    inputs = runs.collate([runs.rows()[0]])
    given = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()  # noqa: E731
    mine = type("Mine", (Doubled, SLoRATrainer), {})
    for trainer, options, more in (
        (SLoRATrainer, {}, {"compute_loss_func": given}),
        (SLoRATrainer, {"label_smoothing_factor": 0.2}, {}),
        (mine, {}, {}),
    ):
        other = runs.ran(trainer(lora(), arguments(tmp_path, max_steps=1, **options), **data, **more))
        assert len(asked) == 1 and (other.compute_loss_func is given) == ("compute_loss_func" in more)
        assert other.overridden == (trainer is mine)
    assert torch.is_tensor(run.compute_loss(run.model, dict(inputs)))
    assert run.compute_loss(run.model, dict(inputs), return_outputs=True)[1].logits.shape == (1, 2)


@pytest.mark.parametrize(("first", "accepted"), [(True, True), (False, False)])
def test_the_first_of_two_processes_decides_on_the_mean_of_what_both_measured(first, accepted):
    """The other one measured as much; it says nothing of the decision, which is what the sum finds."""
    told = {"measured": [], "decided": [], "broken": [], "windows": [], "gradients": []}
    decide = lambda measured: told["measured"].append(measured.tolist()) or Decision(accept=True, score=0.5)  # noqa: E731
    whole = SimpleNamespace(
        _window=[], _measured=torch.tensor([4.0, 1.0, 6.0, 8.0]), model=nn.Module(), ledger=Ledger(steps=2),
        gate=SimpleNamespace(selective=True, decide=decide),
        gate_log=SimpleNamespace(decided=lambda *given: told["decided"].append(given)),
        watch=SimpleNamespace(
            finite=lambda *given: told["broken"].append(given), window=told["windows"].append,
            gradients=lambda: told["gradients"].append(True),
        ),
        accelerator=SimpleNamespace(
            num_processes=2, is_main_process=first, device="cpu", reduce=lambda flat, how: flat, sync_gradients=True
        ),
        total_over_ranks=lambda vector: vector if len(vector) == 1 else 2 * vector,
    )  # fmt: skip
    whole._accepts = partial(GatedTrainer._accepts, whole)
    GatedTrainer._close_window(whole, None)
    assert told["measured"] == [[6.0, 8.0]] and told["broken"] == [(1.0, 3)]
    assert told["decided"] == [(accepted, 0.5)] and told["windows"] == [accepted]
    assert told["gradients"] == [True] * accepted and whole._measured is None
    whole.ledger.commit(lambda vector: vector)
    assert (whole.ledger.score_sum, whole.ledger.score_count) == (0.5, 1)


def test_a_model_is_looked_at_once_with_its_first_labels(tmp_path):
    """Whether the loss can be made of what its head is given; the first eight rows have no label."""
    run = budgeted(decoder(), tmp_path, data=runs.half_empty(), params={"gradient_accumulation": 1}, budget=4)
    run.args.train_sampling_strategy = "sequential"
    seen, verify = [], run.tokens.verify
    run.tokens.verify = lambda model, inputs, labels: (seen.append(labels), verify(model, inputs, labels))
    run.train()
    assert len(seen) == 1 and bool((seen[0] != -100).any()) and run.ledger.steps_without_labels == 2


# what a trainer is made of --------------------------------------------------------------------------


def collated(mark: float):
    return lambda batch: runs.collate(batch) | {"mark": mark}


@pytest.mark.parametrize(("first", "style"), [(True, "plain"), (False, "none")])
def test_one_process_shows_the_run_in_the_budgets_unit(tmp_path, monkeypatch, first, style):
    monkeypatch.setenv("LORAKIT_PROGRESS", "plain")
    monkeypatch.setattr(BudgetTrainer, "is_world_process_zero", lambda _: first)
    progress = runs.trainer(lora(), tmp_path, budget=Budget(9, "flops")).progress
    assert (progress.style, progress.unit) == (style, "FLOPs")


def test_a_budgets_trainer(tmp_path):
    options = {"data_collator": collated(1.0), "eval_collator": collated(2.0), "title": "this one"}
    run = runs.trainer(
        lora(), tmp_path, budget=Budget(3, "accepted_steps"), **options, params={"group_by_length": True}
    )
    assert (run.progress.title, run.progress.amount, run.progress.unit) == ("this one", 3, "accepted steps")
    shown = (PrinterCallback, ProgressCallback)
    assert not [callback for callback in run.callback_handler.callbacks if isinstance(callback, shown)]
    assert [next(iter(run.get_eval_dataloader()))["mark"], next(iter(run.get_train_dataloader()))["mark"]] == [2.0, 1.0]
    sampler = run._get_train_sampler()
    orders = [list(sampler) for sampler.epoch in (0, 1) if sampler.set_epoch(sampler.epoch) is None]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(sampler))) and orders[0] != orders[1]
    run.args.data_seed, run.args.seed = None, 4
    for seed, first, third in ((None, 4_000_012, 4_000_014), (5, 5_000_015, 5_000_017)):
        run.args.data_seed = seed  # it is the Trainer's own where there is none
        sampler = run._get_train_sampler()
        assert sampler.generator.initial_seed() == first
        sampler.set_epoch(2)
        assert sampler.generator.initial_seed() == third
    statistics = torch.tensor([[1.0, 2.0, 0.0, 0.0], [4.0, 2.0, 0.0, 0.0]])
    assert mean_loss(SimpleNamespace(predictions=statistics)) == {"loss": 1.25}


def test_what_a_budgets_trainer_refuses(tmp_path):
    args = training_arguments(Params(), str(tmp_path))
    args.load_best_model_at_end, args.metric_for_best_model = True, "loss"
    with pytest.raises(ParameterError, match="^load_best_model_at_end=True: is keep_best here"):
        BudgetTrainer(model=lora(), args=args, kind="classify", budget=Budget(1), train_dataset=runs.rows())
    (tmp_path / "checkpoint-500").mkdir()
    run = runs.trainer(lora(), tmp_path)
    run.args.save_strategy = "steps"
    with pytest.raises(ParameterError, match="checkpoint-500, which lorakit did not write"):
        run.train()


def test_a_made_model_follows_from_the_seed():
    made = []
    for disturbed, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(disturbed)
        made.append(made_model(None, lambda: nn.Linear(3, 3), seed).weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
    assert made_model(made[0], None, 5) is made[0]
    for model in (None, made[0]):
        with pytest.raises(ParameterError, match="^model_init=.*give either it or a model"):
            made_model(model, None if model is None else nn.Linear, 5)


def test_what_goes_into_a_checkpoint_of_the_model_alone(tmp_path):
    saved = []
    named = SimpleNamespace(save_pretrained=saved.append)
    run = SLoRATrainer(lora(), arguments(tmp_path), train_dataset=runs.rows(), processing_class=named)
    whole = ["gate.pt", "trainable.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]
    assert run.checkpoint_files == [*whole, "trainer_state.json", "ledger.pt"]
    run.args.save_only_model = True
    assert run.checkpoint_files == [*whole[:2], "trainer_state.json", "ledger.pt"]
    run.save_model(str(tmp_path / "here"))
    assert [str(folder) for folder in saved] == [str(tmp_path / "here")]
    assert (tmp_path / "here" / "trainable.safetensors").is_file()
