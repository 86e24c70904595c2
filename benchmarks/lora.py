"""A LoRA training step against PEFT's: same weights, same batch, same loss; time and predicted peak memory."""

from __future__ import annotations

from torch import nn

from benchmarks._adapters import Case, distilbert, minilm, peft_twin, predicted_peak, step_claims
from benchmarks._common import Claim

DESCRIPTION = "LoRA step (forward, backward, AdamW) with lorakit against PEFT, MiniLM and DistilBERT dimensions, fp32"
TARGET = "time and predicted peak memory <= 1.0 x PEFT's at the same loss to 1e-5"
RANK, ALPHA = 8, 16.0
CASES = (Case("MiniLM 32x28", minilm, 32, 28), Case("DistilBERT 16x32", distilbert, 16, 32))


def build_ours(base: nn.Module) -> nn.Module:
    from lorakit.adapters import attach

    return attach(base, "lora", rank=RANK, alpha=ALPHA, seed=0)


def build_peft(base: nn.Module) -> nn.Module:
    from peft import LoraConfig

    return peft_twin(base, LoraConfig, r=RANK, lora_alpha=ALPHA)


def memory_claim(case: Case) -> Claim:
    ours, theirs = (predicted_peak(case, build) for build in (build_ours, build_peft))
    return Claim(f"{case.name}: predicted peak memory", ours, theirs, 1.0, "MiB")


def claims_of(case: Case) -> list[Claim]:
    return [memory_claim(case), *step_claims(case, build_ours, build_peft, "lora", rounds=30, target=1.0)]


def run() -> list[Claim]:
    return [claim for case in CASES for claim in claims_of(case)]
