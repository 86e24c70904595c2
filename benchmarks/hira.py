"""A HiRA training step against PEFT's, all linear layers: same weights, same batch, same loss; time and memory."""

from __future__ import annotations

from torch import nn

from benchmarks._adapters import (
    Case,
    distilbert,
    make_batch,
    minilm,
    peft_twin,
    predicted_peak,
    step_claims,
    stepper,
    twins,
)
from benchmarks._common import Claim, interleave, time_claim
from benchmarks.lora import RANK
from benchmarks.lora import build_ours as build_lora

DESCRIPTION = "HiRA step (forward, backward, AdamW) with lorakit against PEFT, MiniLM and DistilBERT dimensions, fp32"
TARGET = "time <= 0.82 x PEFT's at the same loss to 1e-5; predicted peak memory beyond LoRA's <= 0.1 x PEFT's"
CASES = (Case("MiniLM 32x28", minilm, 32, 28), Case("DistilBERT 16x64", distilbert, 16, 64))


def build_ours(base: nn.Module) -> nn.Module:
    from lorakit.adapters import attach

    return attach(base, "hira", rank=RANK, seed=0)


def build_peft(base: nn.Module) -> nn.Module:
    from peft import HiraConfig

    return peft_twin(base, HiraConfig, r=RANK)


def price_of_rank(case: Case) -> Claim:
    """Our HiRA step over our LoRA step: what the third product of three large ones costs."""
    base, twin = twins(case)
    batch = make_batch(case)
    timing = interleave(stepper(build_ours(base), batch, []), stepper(build_lora(twin), batch, []), rounds=5)
    return time_claim(f"{case.name}: step over LoRA's", timing)


def memory_claim(case: Case) -> Claim:
    lora, ours, theirs = (predicted_peak(case, build) for build in (build_lora, build_ours, build_peft))
    return Claim(f"{case.name}: predicted peak beyond LoRA's", ours - lora, theirs - lora, 0.1, "MiB")


def claims_of(case: Case) -> list[Claim]:
    steps = step_claims(case, build_ours, build_peft, "hira", rounds=9, target=0.82)
    return [memory_claim(case), *steps, price_of_rank(case)]


def run() -> list[Claim]:
    return [claim for case in CASES for claim in claims_of(case)]
