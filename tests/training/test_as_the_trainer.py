"""What a script for the plain Trainer asks for, SLoRATrainer and FLoRATrainer do as it does."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from flora_runs import decoder, flora
from slora_runs import arguments, lora, slora
from transformers import Trainer


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
