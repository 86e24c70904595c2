"""Predicted peak training memory equals the live bytes torch's profiler measures on the CPU."""

from __future__ import annotations

import torch

from benchmarks._common import Claim
from benchmarks._profiled import measured_step_peak, training_step
from lorakit import adapters, models
from lorakit.measure.memory import predict_step_memory

DESCRIPTION = "predicted peak memory of a training step against torch's measured live bytes on the CPU, toy models"
TARGET = "the larger / the smaller <= 1.01"

BATCH, LENGTH = 16, 96
KIND = {"toy-encoder": "classify", "toy-decoder": "causal"}
CASES = [(name, method, {}) for name in KIND for method in ("lora", "head", "full")] + [
    (name, "lora", option) for name in KIND for option in ({"autocast": "bf16"}, {"gradient_checkpointing": True})
]


def run() -> list[Claim]:
    return [_claim(*case) for case in CASES]


def _claim(name: str, method: str, options: dict) -> Claim:
    batch = _batch(KIND[name])
    predicted = predict_step_memory(_model(name, method), batch, **options)["peak"]
    measured = measured_step_peak(lambda: _step(name, method, batch, **options))
    what = " ".join([name, method, *(str(value) if key == "autocast" else key for key, value in options.items())])
    ratio = max(predicted / measured, measured / predicted)
    return Claim(what, predicted / 2**20, measured / 2**20, 1.01, "MiB", ratio)


def _model(name: str, method: str) -> torch.nn.Module:
    model = models.load(name, KIND[name]).model
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # loaded weights are mapped from the file, past torch's allocator
    return adapters.attach(model, method, seed=0)


def _batch(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0  # a padded row, as real batches have
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2 if kind == "classify" else ids}


def _step(name: str, method: str, batch: dict, autocast: str | None = None, gradient_checkpointing: bool = False):
    model = _model(name, method)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return training_step(model, {key: value.clone() for key, value in batch.items()}, autocast)
