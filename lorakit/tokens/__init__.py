"""FLoRA: which tokens of a batch get a backward, by a score of their gradient, and how far the backward goes."""

from torch import nn

from lorakit.errors import require
from lorakit.seams import AllTokens, TokenSelection
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens.fractional import FractionalGate
from lorakit.tokens.selection import TokenGate, refused

PLAIN = TokenSettings(loss="nll")


def build_tokens(
    settings: Gating,
    model: nn.Module,
    kind: str,
    *,
    loss: TokenSettings = PLAIN,
    seed: int = 0,
    rank: int = 0,
    smoothing: float = 0.0,
) -> TokenSelection:
    """The selection of these settings for `model`, whose task is "classify", "masked" or "causal".

    Method "baseline", and any with `topk_tokens` 1, keeps every token: with `loss` "nll", and for a classifier, it is
    the plain model.

    Args:
        loss: what it is made of; smoothing: of the labels.

    Raises:
        ParameterError: a classification task, with a choice or a loss that it has not.
        LorakitError: a model without a linear output head, or one that mode "fractional" cannot serve.
    """
    classifies = kind == "classify"
    require(not classifies or settings.method == "baseline", "gating.method", settings.method, refused(kind))
    require(not classifies or loss.loss in ("exact", "nll"), "loss", loss.loss, refused(kind))
    if not settings.selective and (classifies or loss.loss == "nll"):
        return AllTokens()
    gate = FractionalGate if settings.fractional else TokenGate
    settings = settings if settings.selective else Gating()
    return gate(settings, model, kind, loss=loss, seed=seed, rank=rank, smoothing=smoothing)
