"""What Liger's kernel knows, and what it is told, without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from decoders import of
from torch import nn

from lorakit.adapters import attach
from lorakit.errors import ParameterError
from lorakit.head import Head
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens
from lorakit.tokens.head_loss import HeadLoss

LIGER = TokenSettings(loss="liger")


def test_what_the_kernel_does_not_know_is_refused(monkeypatch):
    kernel = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=lambda **_: None)
    monkeypatch.setattr("lorakit.tokens.head_loss.import_module", lambda name: kernel)
    model = of("llama", tie_word_embeddings=False)
    with pytest.raises(ParameterError, match="^loss='liger': needs the model on CUDA"):
        build_tokens(Gating(), model, "causal", loss=LIGER)
    with pytest.raises(ParameterError, match="^loss='liger': knows no scale of logits"):
        HeadLoss(Head(model.get_output_embeddings(), 32, 99, None, scale=0.5), LIGER)
    with pytest.raises(ParameterError, match="^loss='liger': knows a linear head only"):
        build_tokens(Gating(), attach(model, "lora", target_modules=["lm_head"]), "causal", loss=LIGER)


def test_the_kernel_is_told_of_the_head_and_given_its_weight(monkeypatch):
    told, given = {}, []

    def kernel(**options):
        told.update(options)
        return lambda *tensors: given.append(tensors) or torch.tensor(7.0)

    module, states, targets = nn.Linear(4, 9), torch.randn(3, 4), torch.tensor([1, 0, 8])
    with monkeypatch.context() as patch:
        liger = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=kernel)
        patch.setattr("lorakit.tokens.head_loss.import_module", lambda name: liger)
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        loss = HeadLoss(Head(module, 4, 9, 2.0), LIGER, smoothing=0.1)(states, targets)
    assert loss == 7 and told == {"reduction": "sum", "softcap": 2.0, "label_smoothing": 0.1}
    assert [*map(id, given[0])] == [*map(id, (module.weight, states, targets, module.bias))]
