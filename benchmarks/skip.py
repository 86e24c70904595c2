"""SkipLoRA's backward against LoRA's: a skipped prefix of half the blocks, and what the metric costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks._adapters import Case, make_batch
from benchmarks._common import Claim, interleave
from benchmarks.lora import CASES, build_ours

DESCRIPTION = (
    "SkipLoRA with half the blocks (prefix) or adapters (adapter) skipped against LoRA, MiniLM, DistilBERT, Gemma"
)
TARGET = "prefix: backward FLOPs <= 0.55 x, seconds <= 0.6 x; the metric <= 1 % of a step's seconds and <= 1 MB"
MEGABYTE = 1e6


def skipper(model: nn.Module, mode: str, **options):
    """SkipLoRA past its warm-up, half of the adapters below the threshold."""
    from lorakit.settings import SkipSettings
    from lorakit.skip.controller import SkipLoRA

    settings = SkipSettings(skip=mode, skip_share=0.5, skip_warmup=0.0, skip_explore=0.0, skip_ema=1.0, **options)
    skip = SkipLoRA(model, settings=settings)
    count = len(skip.paths)
    # every second adapter is small; for a prefix the order alone counts
    skip.metric = [0.01 if place % 2 else 0.5 for place in range(count)]
    skip.begin()
    skip.steps = 1  # between two measurements
    skip.begin_step(0.5)
    return skip


def prepared(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = build_ours(case.base()).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def backward_flops(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    from lorakit.measure.flops import FlopCount

    loss = model(**batch).loss
    with FlopCount() as count:
        loss.backward()
    model.zero_grad()
    return count.total / 1e9


def backward(model: nn.Module, batch: dict[str, torch.Tensor], spent: list[float]) -> Callable[[], None]:
    """A step whose backward alone is timed: seconds go into `spent`."""
    import time

    def step() -> None:
        loss = model(**batch).loss
        start = time.perf_counter()
        loss.backward()
        spent.append(time.perf_counter() - start)
        model.zero_grad()

    return step


def backward_claim(case: Case) -> Claim:
    import statistics

    batch, full, part = make_batch(case), [], []
    plain, skipping = prepared(case), prepared(case)
    skipper(skipping, "prefix")
    interleave(backward(skipping, batch, part), backward(plain, batch, full), rounds=20)
    ratio = statistics.median(a / b for a, b in zip(part, full, strict=True))
    return Claim(
        f"{case.name}: backward, prefix", statistics.median(part) * 1e3, statistics.median(full) * 1e3, 0.6, "ms", ratio
    )


def flop_claims(case: Case) -> list[Claim]:
    batch, model = make_batch(case), prepared(case)
    full = backward_flops(model, batch)
    claims = []
    for mode, target in (("prefix", 0.55), ("adapter", 1.0)):
        skip = skipper(model, mode)
        claims.append(
            Claim(f"{case.name}: backward FLOPs, {mode}", backward_flops(model, batch), full, target, "GFLOP")
        )
        skip.end()
    return claims


def metric_claims(case: Case) -> list[Claim]:
    """A step that measures every adapter against one that does not; by default only every fourth step measures."""
    batch = make_batch(case)
    plain, measuring = prepared(case), prepared(case)
    skip = skipper(measuring, "prefix")
    for probe in skip.probes:
        probe.active = True

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for probe in skip.probes:
                probe.measuring, probe.squares = True, None
            model(**batch).loss.backward()
            model.zero_grad()

        return run

    timing = interleave(step(measuring), step(plain), rounds=20)
    every = skip.settings.skip_measure_every
    share = 1 + (timing.ratio - 1) / every
    name = f"{case.name}: step, measured every {every}th time"
    claim = Claim(name, timing.theirs * share * 1e3, timing.theirs * 1e3, 1.01, "ms", share)
    return [claim, metric_memory(case, measuring, plain, batch)]


def metric_memory(case: Case, measuring: nn.Module, plain: nn.Module, batch: dict[str, torch.Tensor]) -> Claim:
    """Predicted peak of a measuring step beyond a plain one's."""
    from lorakit.measure.memory import predict_step_memory

    for module in measuring.modules():
        if getattr(module, "probe", None) is not None:
            module.probe.measuring, module.probe.squares = True, None
    extra = predict_step_memory(measuring, batch)["peak"] - predict_step_memory(plain, batch)["peak"]
    return Claim(f"{case.name}: the metric's memory", extra / MEGABYTE, 1.0, 1.0, "MB")


def gemma_claims() -> list[Claim]:
    """Gemma 3 270M's dimensions on the meta device: the head's backward is done whatever is skipped."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from lorakit.measure.dry import fake, fake_mode, faked

    sizes = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 1024}
    with torch.device("meta"):
        model = build_ours(Gemma3ForCausalLM(Gemma3TextConfig(**sizes))).train()
        ids = torch.zeros(4, 256, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids}  # a mask would be looked at, and there are no values
    mode = fake_mode()
    with faked(model, mode):  # tensors without data that, unlike meta ones, know a device
        fakes = {name: fake(mode, value) for name, value in batch.items()}
        with mode:
            full = backward_flops(model, fakes)
        skip = skipper(model, "prefix")  # outside: it draws random numbers, which must be real
        with mode:
            part = backward_flops(model, fakes)
        skip.end()
    head = 2 * 4 * 256 * 640 * 262144 / 1e9
    return [
        Claim("Gemma 270M 4x256: backward FLOPs, prefix", part, full, 1.0, "GFLOP"),
        Claim("Gemma 270M 4x256: backward FLOPs, the head's", head, full, unit="GFLOP"),
    ]


def run() -> list[Claim]:
    claims = [claim for case in CASES for claim in flop_claims(case)]
    claims += gemma_claims()
    for case in CASES:
        claims += [backward_claim(case), *metric_claims(case)]
    return claims
