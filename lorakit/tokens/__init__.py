"""FLoRA: which tokens of a batch get a backward, by a score of their gradient, and how far the backward goes."""

from torch import nn

from lorakit.errors import require
from lorakit.seams import AllTokens, TokenSelection
from lorakit.settings import Gating
from lorakit.tokens.fractional import FractionalGate
from lorakit.tokens.selection import TokenGate, refused


def build_tokens(settings: Gating, model: nn.Module, kind: str, *, seed: int = 0, rank: int = 0) -> TokenSelection:
    """The selection of these settings for `model`, whose task is "classify", "masked" or "causal".

    Method "baseline", and any with `topk_tokens` 1, is the plain model.

    Raises:
        ParameterError: a classification task.
        LorakitError: a model without a linear output head, or one that mode "fractional" cannot serve.
    """

    if settings.method == "baseline":
        return AllTokens()
    require(kind != "classify", "gating.method", settings.method, refused(kind))
    if not settings.selective:
        return AllTokens()
    if settings.mode == "gather":
        return TokenGate(settings, model, kind, seed=seed, rank=rank)

    return FractionalGate(settings, model, kind, seed=seed, rank=rank)
