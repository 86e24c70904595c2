"""What the tests of sparse LoRA share: a model, its training, its zeros."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs

from lorakit.adapters import attach
from lorakit.adapters.attachment import trained_tensors
from lorakit.adapters.sparsify import Sparsifier


@pytest.fixture
def model(tiny_bert):
    """The same tiny BERT with Sparse LoRA, as fresh as attach leaves it."""

    def build(method="sparse", **options):
        torch.manual_seed(0)
        base = tiny_bert(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return attach(base, method, **{"rank": 8, "seed": 0} | options)

    return build


@pytest.fixture
def moved(model):
    """The same with weights as after training: no factor is zero."""

    def build(*arguments, **options):
        built = model(*arguments, **options)
        with torch.no_grad():
            for name, tensor in trained_tensors(built).items():
                generator = torch.Generator().manual_seed(len(name))
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        return built

    return build


def pruned(built, target=0.5, **settings):
    """`built`, pruned at once."""
    Sparsifier(built, runs.zeros(**settings | {"sparsity": target})).prune_to(target)
    return built


def batch(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (size, 12), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2}
