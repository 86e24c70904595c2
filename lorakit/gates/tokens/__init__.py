"""FLoRA: which tokens of a batch get a backward, by a score of their gradient, and how far the backward goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.errors import require
from lorakit.gates.tokens.protocol import AllTokens, Selected, TokenSelection, count_tokens
from lorakit.gating import Gating

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AllTokens", "Gating", "Selected", "TokenSelection", "build_tokens", "count_tokens"]


def build_tokens(settings: Gating, model: nn.Module, kind: str, *, seed: int = 0, rank: int = 0) -> TokenSelection:
    """The selection of these settings for `model`, whose task is "classify", "masked" or "causal".

    Method "baseline", and any with `topk_tokens` 1, is the plain model.

    Raises:
        ParameterError: a classification task.
        LorakitError: a model without a linear output head, or one that mode "fractional" cannot serve.
    """
    from lorakit.gates.tokens.selection import TokenGate, refused

    if settings.method == "baseline":
        return AllTokens()
    require(kind != "classify", "gating.method", settings.method, refused(kind))
    if not settings.selective:
        return AllTokens()
    if settings.mode == "gather":
        return TokenGate(settings, model, kind, seed=seed, rank=rank)
    from lorakit.gates.tokens.fractional import FractionalGate

    return FractionalGate(settings, model, kind, seed=seed, rank=rank)
