"""Inference latency: the median wall-clock time of a forward pass without gradients."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

from lorakit.modules import evaluating


def inference_latency(model: nn.Module, batch: Mapping[str, torch.Tensor], repeats: int, warmup: int = 2) -> float:
    """Median milliseconds of `model(**batch)` over `repeats` calls, at least one, in evaluation and inference mode.

    The batch must be on the model's device; CUDA is synchronised before and after each call. The model's training
    mode comes back afterwards.
    """
    wait = torch.cuda.synchronize if any(value.is_cuda for value in batch.values()) else lambda: None
    milliseconds = []
    with evaluating(model), torch.inference_mode():
        for _ in range(warmup + repeats):
            wait()
            start = time.perf_counter()
            model(**batch)
            wait()
            milliseconds.append((time.perf_counter() - start) * 1e3)
    return statistics.median(milliseconds[warmup:])
