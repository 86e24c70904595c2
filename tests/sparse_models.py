"""What the tests of sparse LoRA share: a model, its training, its zeros."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from small_models import perturb

from lorakit.adapters import attach
from lorakit.adapters.sparsify import Sparsifier


@pytest.fixture
def model():
    """The same tiny BERT with Sparse LoRA, as fresh as attach leaves it."""
    return lambda method="sparse", **options: attach(bare(), method, **{"rank": 8, "seed": 0} | options)


def bare():
    return runs.tiny_bert(num_hidden_layers=1)


@pytest.fixture
def moved(model):
    """The same with weights as after training: no factor is zero."""
    return lambda *arguments, **options: perturb(model(*arguments, **options))


def pruned(built, target=0.5, **settings):
    """`built`, pruned at once."""
    Sparsifier(built, runs.zeros(**settings | {"sparsity": target})).prune_to(target)
    return built


def batch(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (size, 12), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2}
