"""Predicted peak memory of a step against what CUDA's allocator gave out, or on a CPU torch's profiler saw."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks._common import Claim
from benchmarks._decoders import batch_of, exact
from benchmarks._gpu.comparing import Comparison, Decoder, Sizes
from benchmarks._profiled import measured_step_peak, training_step
from benchmarks.lora import build_ours
from benchmarks.tokens import selection
from lorakit import adapters
from lorakit.measure.memory import cuda_peak_bytes, predict_step_memory, reset_cuda_peak

HOW = (
    "The peak of a training step (forward, backward, AdamW; weights and autocast in bf16), predicted by\n"
    '`predict_step_memory(…, device="cuda")` (ours) and measured by `torch.cuda.max_memory_allocated` (theirs), of\n'
    "the second step, less what was allocated before the model was made. The ratio is of the larger to the smaller."
)
TARGET = 1.10
WAYS: dict[str, Callable[[nn.Module], Any]] = {  # -> what makes the loss; none: the model, of all logits
    "LoRA": lambda model: None,
    "full": lambda model: None,
    "NF4": lambda model: None,
    "exact loss": exact,
    "fractional 20 %": lambda model: selection(model, 0.2, "fractional", "update"),
}


def comparisons(sizes: Sizes, device: str) -> list[Comparison]:
    return [
        Comparison(
            name := f"{decoder.name}, {way}: peak",
            TARGET,
            functools.partial(claim, name, decoder, way, device),
            "bitsandbytes" if way == "NF4" else "",
        )
        for decoder in sizes.decoders
        for way in WAYS
    ]


def claim(name: str, decoder: Decoder, way: str, device: str) -> Claim:
    model = made(decoder, way, "meta")
    batch = batch_of(decoder.shape)
    options = {"autocast": "bf16", "device": device, "tokens": WAYS[way](model)}
    predicted = predict_step_memory(model, batch, **options)["peak"]

    def prepare() -> Callable[[], None]:
        real = made(decoder, way, device)
        real.config.use_cache = False
        given = {key: value.clone().to(device) for key, value in batch.items()}
        return training_step(real, given, "bf16", WAYS[way](real))

    measured = cuda_step_peak(prepare) if device == "cuda" else measured_step_peak(prepare)
    ratio = max(predicted / measured, measured / predicted)
    return Claim(name, predicted / 2**20, measured / 2**20, TARGET, "MiB", ratio)


def made(decoder: Decoder, way: str, device: str) -> nn.Module:
    """The adapted model in bf16, on "meta" without data."""
    torch.manual_seed(0)
    with torch.device(device):
        base = decoder.build().bfloat16()
    if way == "NF4":
        from lorakit.runs.plan import quantize_meta

        quantize = quantize_meta if device == "meta" else adapters.quantize_nf4
        quantize(base)
    return (adapters.attach(base, "full") if way == "full" else build_ours(base)).train()


def cuda_step_peak(prepare: Callable[[], Callable[[], object]]) -> int:
    """Most bytes allocated in a step of steady state, with all that `prepare` made; see `measured_step_peak`."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = prepare()
    step()
    gc.collect()
    reset_cuda_peak()
    step()
    torch.cuda.synchronize()
    return cuda_peak_bytes() - before
