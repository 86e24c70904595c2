"""Two processes over gloo: the same decisions and the same weights, bit for bit, on both."""

from __future__ import annotations

import torch
import training_runs as runs
import two_processes

from lorakit.adapters import attach
from lorakit.adapters.skip import SkipSettings
from lorakit.training import Budget
from lorakit.training.skipping import SkipLoRA


def tiny():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=99, pad_token_id=0, num_labels=2, **sizes))


def skipping(folder: str, **options) -> dict:
    """A short run that skips; what this process ended with."""
    model = attach(tiny(), "lora", rank=4, seed=0)
    settings = SkipSettings(warmup=0.2, explore=0.2, measure_every=2, **options)
    skip = SkipLoRA(model, settings, seed=1)
    decided = []
    after = skip.after_step
    skip.after_step = lambda *a: (decided.append(skip.signature()[0]), after(*a))
    trainer = runs.trainer(
        model, folder, budget=Budget(12, "steps"), controllers=[skip], params={"skip": options["mode"]}
    )
    trainer.train()
    return {
        "weights": runs.weights(model),
        "decided": decided,
        "metric": skip.metric,
        "tokens": trainer.ledger.tokens,
        "processes": trainer.accelerator.num_processes,
        "loss": [point.train_loss for point in trainer.curve.points],
    }


def both_kinds(folder: str) -> dict:
    prefix = skipping(f"{folder}/prefix", mode="prefix", share=0.5)
    return {"prefix": prefix, "forward": skipping(f"{folder}/forward", mode="adapter", decide="forward", share=0.5)}


def test_skiplora_decides_alike_everywhere(tmp_path):
    results = two_processes.run("test_distributed", "both_kinds", tmp_path)
    untrained = runs.weights(attach(tiny(), "lora", rank=4, seed=0))
    for kind in ("prefix", "forward"):
        first, second = (result[kind] for result in results)
        assert first["processes"] == second["processes"] == 2
        assert first["decided"] == second["decided"] and len(set(first["decided"])) > 1
        assert first["metric"] == second["metric"] and first["tokens"] == second["tokens"]
        assert runs.equal(first["weights"], second["weights"])
        assert not runs.equal(first["weights"], untrained)
