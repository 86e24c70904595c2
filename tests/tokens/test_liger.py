"""What Liger's kernel knows, without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from decoders import of

from lorakit.adapters import attach
from lorakit.errors import ParameterError
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens


def test_what_the_kernel_does_not_know_is_refused(monkeypatch):
    kernel = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=lambda **_: None)
    monkeypatch.setattr("lorakit.tokens.head_loss.import_module", lambda name: kernel)
    model, liger = of("llama", tie_word_embeddings=False), TokenSettings(loss="liger")
    with pytest.raises(ParameterError, match="^loss='liger': needs the model on CUDA"):
        build_tokens(Gating(), model, "causal", loss=liger)
    with pytest.raises(ParameterError, match="^loss='liger': knows a linear head only"):
        build_tokens(Gating(), attach(model, "lora", target_modules=["lm_head"]), "causal", loss=liger)
