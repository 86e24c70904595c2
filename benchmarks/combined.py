"""Four answers at once: a fifth of the tokens by the layers' score, half of the blocks, 4 bits, the exact loss."""

from __future__ import annotations

import functools

import torch
from torch import nn

from benchmarks._common import Claim
from benchmarks._decoders import SHARES, bare, batch_of, exact, gemma_270m
from benchmarks.lora import build_ours
from benchmarks.tokens import selection
from lorakit.studies.token_costs import step_flops

DESCRIPTION = "fractional 20 % by the layers' score, SkipLoRA prefix 1/2, NF4 and the exact loss in one step"
TARGET = (
    "Gemma 270M 4x256 bf16, all / a quarter of the tokens are targets: FLOPs over exact LoRA's <= 0.38 / 0.43, "
    "predicted peak over plain LoRA's <= 0.15 / 0.13"
)


@functools.cache
def combined() -> nn.Module:
    """The model without data: linear layers in 4 bits, LoRA, the first half of the blocks resting."""
    from lorakit.runs.plan import quantize_meta

    with torch.device("meta"):
        base = gemma_270m().bfloat16()
    quantize_meta(base)
    with torch.device("meta"):
        model = build_ours(base).train()
    rest(model)
    return model


def rest(model: nn.Module) -> None:
    """Let SkipLoRA take the first half of the blocks off, as in a step after the warm-up."""
    from lorakit.settings import SkipSettings
    from lorakit.skip.controller import SkipLoRA

    skip = SkipLoRA(model, settings=SkipSettings(skip="prefix", skip_share=0.5, skip_warmup=0.0, skip_explore=0.0))
    skip.bind_two_passes()
    skip.begin()
    skip.begin_step(0.5)


def run() -> list[Claim]:
    from lorakit.measure.memory import predict_step_memory

    plain, ours, mib, claims = bare(gemma_270m), combined(), 2**20, []
    predict = functools.partial(predict_step_memory, autocast="bf16", device="cuda")
    for told, share in SHARES.items():
        batch, tokens = batch_of((4, 256), share), selection(ours, 0.2, "fractional", "update")
        flops = [step_flops(ours, batch, tokens) / 1e9, step_flops(plain, batch, exact(plain)) / 1e9]
        peaks = [predict(ours, batch, tokens=tokens)["peak"] / mib, predict(plain, batch)["peak"] / mib]
        claims.append(Claim(f"combined{told}: FLOPs", *flops, 0.43 if told else 0.38, "GFLOP"))
        claims.append(Claim(f"combined{told}: peak over plain LoRA's", *peaks, 0.13 if told else 0.15, "MiB"))
    return claims
