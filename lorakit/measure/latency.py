"""Inference latency: the median wall-clock time of a forward pass without gradients."""

import statistics
import time
import timeit
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
    with evaluating(model), torch.inference_mode():
        seconds = timeit.repeat(lambda: (model(**batch), wait()), wait, time.perf_counter, warmup + repeats, 1)
    return 1e3 * statistics.median(seconds[warmup:])
