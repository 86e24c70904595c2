"""What the tests of SkipLoRA share: batches, prepared models, gradients."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from torch import nn

from lorakit.adapters import attach
from lorakit.skip.controller import SkipLoRA

ALWAYS = {"warmup": 0.0, "explore": 0.0, "ema": 1.0, "measure_every": 1}


def batch(rows: int = 6, tokens: int = 10) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, 6:] = mask[3, 2:] = 0
    ids = torch.randint(1, 99, (rows, tokens), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def at_work(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Give every adapter an update of its own size."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std, generator=generator)
    return model


def plain_peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = ["query", "key", "value", "dense"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=names, exclude_modules=r".*pooler.*", lora_alpha=8))


def ours(model: nn.Module) -> nn.Module:
    return attach(
        model, "lora", rank=4, alpha=8.0, target_modules=r".*encoder.*(query|key|value|dense)", trainable=(), seed=0
    )


def prepared(build, tiny_bert, **options) -> tuple[nn.Module, SkipLoRA]:
    """A model in training whose adapters are at work, and its started SkipLoRA."""
    torch.manual_seed(0)
    model = at_work(build(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train())
    skip = SkipLoRA(model, settings=runs.skipping(**ALWAYS | options))
    skip.begin()
    return model, skip


def backward(model: nn.Module, skip: SkipLoRA, metric: list[float] | None = None, **sizes: int) -> None:
    """One batch of a step that `skip` begins, with a metric given or its own."""
    skip.metric = skip.metric if metric is None else metric
    skip.begin_step(0.5)
    model(**batch(**sizes)).loss.backward()


HALF = [0.01] * 6 + [0.5] * 6
modes = pytest.mark.parametrize("mode", ["adapter", "prefix"])
decisions = pytest.mark.parametrize("decide", ["ema", "forward"])
both = pytest.mark.parametrize("build", [ours, plain_peft], ids=["ours", "peft"])
