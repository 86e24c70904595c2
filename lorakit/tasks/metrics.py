"""Metrics from statistics (N, 4): summed loss in nats, valid labels, prediction, label; one row per example."""

from __future__ import annotations

import numpy as np


def classification(stats: np.ndarray) -> dict[str, float]:
    """Loss per example and accuracy."""
    return {"loss": _loss(stats), "accuracy": float((stats[:, 2] == stats[:, 3]).mean())}


def classification_f1(stats: np.ndarray) -> dict[str, float]:
    """As `classification`, and F1 of class 1: 2 TP / (2 TP + FP + FN), 0 where there is no such row."""
    predicted, actual = stats[:, 2] == 1, stats[:, 3] == 1
    hits, wrong = (predicted & actual).sum(), (predicted != actual).sum()
    return classification(stats) | {"f1": float(2 * hits / (2 * hits + wrong)) if hits else 0.0}


def causal(stats: np.ndarray) -> dict[str, float]:
    """Loss per predicted token, its exponential, and the share of tokens predicted right."""
    return {"loss": _loss(stats), "perplexity": _exp(_loss(stats)), "token_accuracy": _token_accuracy(stats)}


def masked(stats: np.ndarray) -> dict[str, float]:
    """As `causal` over masked tokens; the exponential is called `masked_perplexity`.

    It is over the 15 % of tokens that the fixed evaluation masks hide, many at once: neither a language model's
    perplexity nor the pseudo-perplexity of `tasks.pseudo_perplexity`, which hides one token at a time.
    """
    return {"loss": _loss(stats), "masked_perplexity": _exp(_loss(stats)), "token_accuracy": _token_accuracy(stats)}


def _loss(stats: np.ndarray) -> float:
    return float(stats[:, 0].sum() / stats[:, 1].sum())


def _token_accuracy(stats: np.ndarray) -> float:
    return float(stats[:, 2].sum() / stats[:, 3].sum())


def _exp(loss: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(loss))
