"""Gemma's dimensions with random weights or none, its batches, and the exact loss that a step is held against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.lora import build_ours

SHARES = {"": 1.0, ", 25 % targets": 0.25}  # of a batch's tokens that are predicted


def gemma(hidden: int, intermediate: int, layers: int, vocabulary: int = 262_144) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": vocabulary}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, max_position_embeddings=4096))


def gemma_270m() -> nn.Module:
    return gemma(640, 2048, 18)


def gemma_1b() -> nn.Module:
    return gemma(1152, 6912, 26)


def batch_of(shape: tuple[int, int], targets: float = 1.0) -> dict[str, torch.Tensor]:
    """Ids, mask and labels (B, T); the first tokens of a row are a prompt, so that `targets` of all are predicted."""
    ids = torch.ones(shape, dtype=torch.long)
    labels = ids.clone()
    labels[:, : round((1 - targets) * shape[1])] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@functools.cache
def bare(build: Callable[[], nn.Module]) -> nn.Module:
    """The adapted model without data, weights in bfloat16."""
    with torch.device("meta"):
        return build_ours(build().bfloat16()).train()


def exact(model: nn.Module, mib: float = 96) -> Any:
    """The loss of all tokens, their logits `mib` MiB at a time."""
    from lorakit.settings import Gating, TokenSettings
    from lorakit.tokens import build_tokens

    return build_tokens(Gating(), model, "causal", loss=TokenSettings(logits_mib=mib))
