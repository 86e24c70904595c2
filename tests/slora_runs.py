"""What the tests of SLoRATrainer share: models, arguments, a trainer."""

from __future__ import annotations

import flora_runs
import training_runs as runs

from lorakit.adapters import attach
from lorakit.training import SLoRATrainer

GATE = {"m": 64, "k": 8, "target_novelty": 0.4, "burn_in": 4, "reorth_every": 2, "k_topk": 16, "novelty_ema_rate": 0.1}


def lora(model=None):
    return attach(runs.tiny_bert() if model is None else model, "lora", rank=4, seed=0)


def arguments(folder, **options):
    return flora_runs.arguments(folder, **{"max_steps": 20} | options)


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
