"""Inference latency: the median wall-clock time of a forward pass without gradients."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lorakit.errors import require


def inference_latency(model: nn.Module, batch: Mapping[str, torch.Tensor], repeats: int, warmup: int = 2) -> float:
    """Median milliseconds of `model(**batch)` over `repeats` calls, in evaluation and inference mode.

    The batch must be on the model's device; CUDA is synchronised before and after each call. The model's training
    mode comes back afterwards.

    Raises:
        ParameterError: `repeats < 1`.
    """
    require(repeats >= 1, "repeats", repeats, "at least 1")
    with _evaluating(model), torch.inference_mode():
        for _ in range(warmup):
            model(**batch)
        return statistics.median(_milliseconds(model, batch) for _ in range(repeats))


def _milliseconds(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> float:
    _synchronise(batch)
    start = time.perf_counter()
    model(**batch)
    _synchronise(batch)
    return (time.perf_counter() - start) * 1e3


def _synchronise(batch: Mapping[str, torch.Tensor]) -> None:
    if any(value.is_cuda for value in batch.values()):
        torch.cuda.synchronize()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
