"""A HiRA training step against PEFT's, all linear layers: same weights, same batch, same loss; time and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks._common import Claim, interleave, time_claim
from benchmarks.lora import RANK, Case, distilbert, make_batch, minilm, stepper
from benchmarks.lora import build_ours as build_lora

DESCRIPTION = "HiRA step (forward, backward, AdamW) with lorakit against PEFT, MiniLM and DistilBERT dimensions, fp32"
TARGET = "time <= 0.82 x PEFT's at the same loss to 1e-5; predicted peak memory beyond LoRA's <= 0.1 x PEFT's"
CASES = (Case("MiniLM 32x28", minilm, 32, 28), Case("DistilBERT 16x64", distilbert, 16, 64))
NO_TARGET = float("inf")  # a number to know, not a claim


def build_ours(base: nn.Module) -> nn.Module:
    from lorakit.adapters import attach

    return attach(base, "hira", rank=RANK, seed=0)


def build_peft(base: nn.Module) -> nn.Module:
    """PEFT on the same layers and the same task head (its own "all-linear" fails on DistilBERT's two-layer head)."""
    from peft import HiraConfig, TaskType, get_peft_model

    from lorakit.adapters.targets import resolve_targets, task_head

    head = task_head(base)
    targets = resolve_targets(base, "all-linear", head)
    config = HiraConfig(r=RANK, target_modules=targets, modules_to_save=head, task_type=TaskType.SEQ_CLS)
    return get_peft_model(base, config)


def copy_to_peft(ours: nn.Module, theirs: nn.Module) -> None:
    """Give both the same adapters, with B no longer zero so that the adapters are at work."""
    from peft import set_peft_model_state_dict

    from lorakit.adapters import adapter_layers, adapter_state
    from lorakit.adapters.peft_format import name_in_file

    for layer in adapter_layers(ours).values():
        nn.init.normal_(layer.hira_B, std=0.02)
    state = {name_in_file("hira", name): tensor for name, tensor in adapter_state(ours).items()}
    unexpected = set_peft_model_state_dict(theirs, state).unexpected_keys
    assert not unexpected, unexpected


def twins(case: Case) -> tuple[nn.Module, nn.Module]:
    """The case's model twice, with the same random weights."""
    torch.manual_seed(0)
    base, twin = case.base(), case.base()
    twin.load_state_dict(base.state_dict())
    return base, twin


def step_claims(case: Case) -> list[Claim]:
    """Time of a step, and the largest difference between the two sides' losses over all steps taken."""
    base, twin = twins(case)
    ours, theirs = build_ours(base), build_peft(twin)
    copy_to_peft(ours, theirs)
    batch, my_losses, their_losses = make_batch(case), [], []
    timing = interleave(stepper(ours, batch, my_losses), stepper(theirs, batch, their_losses), rounds=9)
    gap = max(abs(a - b) for a, b in zip(my_losses, their_losses, strict=True))
    return [
        Claim(f"{case.name}: loss gap over {len(my_losses)} steps / 1e-5", gap, 1e-5, 1.0, "nats"),
        time_claim(f"{case.name}: step", timing, 0.82),
    ]


def price_of_rank(case: Case) -> Claim:
    """Our HiRA step over our LoRA step: what the third product of three large ones costs."""
    base, twin = twins(case)
    batch = make_batch(case)
    timing = interleave(stepper(build_ours(base), batch, []), stepper(build_lora(twin), batch, []), rounds=5)
    return time_claim(f"{case.name}: step over LoRA's, no target", timing, NO_TARGET)


def memory_claim(case: Case) -> Claim:
    lora, ours, theirs = (predicted_peak(case, build) for build in (build_lora, build_ours, build_peft))
    return Claim(f"{case.name}: predicted peak beyond LoRA's", ours - lora, theirs - lora, 0.1, "MiB")


def predicted_peak(case: Case, build: Callable[[nn.Module], nn.Module]) -> float:
    """MiB at the peak of a training step."""
    from lorakit.measure.memory import predict_training_memory

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            base = case.base()
        return build(base)

    return predict_training_memory(on_meta, partial(make_batch, case))["peak"] / 2**20


def run() -> list[Claim]:
    return [claim for case in CASES for claim in (memory_claim(case), *step_claims(case), price_of_rank(case))]
