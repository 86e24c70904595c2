"""What the tests of FLoRATrainer share: a decoder, arguments, trainers."""

from __future__ import annotations

import decoders
import pytest
import training_runs as runs
from torch import nn

from lorakit.adapters import attach
from lorakit.params import Params
from lorakit.settings import Gating
from lorakit.tokens import build_tokens
from lorakit.training import Budget, BudgetTrainer, FLoRATrainer
from lorakit.training.arguments import training_arguments

MODES = ("gather", "fractional")


modes = pytest.mark.parametrize("mode", MODES)


def decoder(**options) -> nn.Module:
    """Adapters that are no longer zero on a small Gemma with both kinds of layers."""
    return adapted(runs.tiny_gemma(**decoders.MIXED | options))


def adapted(model: nn.Module) -> nn.Module:
    return decoders.nonzero(attach(model, "lora", rank=4, seed=0))


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
