"""What a script for the plain Trainer asks for, SLoRATrainer and FLoRATrainer do as it does."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from flora_runs import decoder, flora
from slora_runs import lora, slora


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
