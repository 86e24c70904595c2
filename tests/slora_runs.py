"""What the tests of SLoRATrainer share: a gate that opens as told, models, arguments, a trainer."""

from __future__ import annotations

import training_runs as runs

from lorakit.adapters import attach
from lorakit.seams import Gate
from lorakit.training import SLoRATrainer

GATE = {"m": 64, "k": 8, "target_novelty": 0.4, "burn_in": 4, "reorth_every": 2, "k_topk": 16, "novelty_ema_rate": 0.1}


class Open(Gate):
    """Accepts everything, but through the window's end like every gate that selects."""

    name, selective = "open", True


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
