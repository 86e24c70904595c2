"""Step times of ours over theirs, and how often a step waits for the GPU: not more often in a deeper model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import cache, examples, gate, hira, lora, skip
from benchmarks._adapters import Case, copy_to_peft, make_batch, stepper, twins
from benchmarks._common import NO_TARGET, Claim
from benchmarks._decoders import batch_of, exact
from benchmarks._gpu.comparing import Comparison, Decoder, Sides, Sizes, Step, tiny
from benchmarks.tokens import selection

HOW = (
    "Medians of interleaved steps, between CUDA events on a GPU that had nothing else to do. Classifiers: forward,\n"
    "backward, AdamW; decoders: forward and backward, weights and autocast in bf16, SDPA; gates as in `python -m\n"
    "benchmarks gate`. *Waits* are the copies to the CPU and the `.item()` calls that torch's profiler counts in one\n"
    "forward and backward: as many in a model of 4 layers as in one of 2."
)


def comparisons(sizes: Sizes, device: str) -> list[Comparison]:
    parts = (of_adapters, of_losses, of_gates, of_savings)
    return [*(one for part in parts for one in part(sizes, device)), *of_waits(device)]


# adapters ----------------------------------------------------------------------------------------------


def of_adapters(sizes: Sizes, device: str) -> Iterator[Comparison]:
    case = sizes.classifier

    def over_peft(module: Any, method: str, in_half: bool) -> Sides:
        base, twin = twins(case)
        sides = module.build_ours(base), module.build_peft(twin)
        copy_to_peft(*sides, method)
        return tuple(trained(model, sizes, device, in_half) for model in sides)

    def prefix() -> Sides:
        skipping, plain = skip.prepared(case), skip.prepared(case)
        skip.skipper(skipping, "prefix")
        return tuple(trained(model, sizes, device, True) for model in (skipping, plain))

    for method, module, goal in (("LoRA", lora, 1.0), ("HiRA", hira, 0.82)):
        for precision in ("bf16", "TF32"):
            sides = functools.partial(over_peft, module, method.lower(), precision == "bf16")
            yield Comparison(f"{case.name}, {precision}: {method} over PEFT's", goal, sides)
    yield Comparison(f"{case.name}, bf16: SkipLoRA's prefix, half of the blocks, over LoRA", 0.85, prefix)


def batch_on(device: str, case: Case) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in make_batch(case).items()}


def trained(model: nn.Module, sizes: Sizes, device: str, in_half: bool) -> Step:
    """A classifier's step; weights in fp32, products in bf16 (as accelerate wraps a model for it) or in TF32."""
    from accelerate.utils import convert_outputs_to_fp32

    model.to(device)
    batch = batch_on(device, sizes.classifier)
    if in_half:
        model.forward = convert_outputs_to_fp32(torch.autocast(device, torch.bfloat16)(model.forward))
        return stepper(model, batch, [])
    step = stepper(model, batch, [])

    def in_tf32() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            step()
        finally:
            torch.set_float32_matmul_precision(before)

    return in_tf32


# losses and choices of tokens --------------------------------------------------------------------------


class Steps:
    """A decoder on the device, adapted; each other method is one of its forwards and backwards, by a loss."""

    def __init__(self, decoder: Decoder, device: str, targets: float = 1.0, attention: str = "sdpa", adapt: Any = None):
        torch.manual_seed(0)
        with torch.device(device):
            base = decoder.build().bfloat16()
        base.set_attn_implementation(attention)
        self.model, self.device = (adapt or lora.build_ours)(base).train(), device
        self.model.config.use_cache = False
        batch = batch_of(decoder.shape, targets)
        ids = torch.randint(1, self.model.config.vocab_size, decoder.shape)
        self.labels = ids.masked_fill(batch.pop("labels") == -100, -100).to(device)
        self.inputs = {name: value.to(device) for name, value in (batch | {"input_ids": ids}).items()}

    def _by(self, loss: Callable[[], torch.Tensor]) -> Step:
        def step() -> None:
            with torch.autocast(self.device, torch.bfloat16):
                made = loss()
            made.backward()

        return step

    def _chosen(self, tokens: Any) -> Step:
        return self._by(lambda: tokens.select(self.model, self.inputs, self.labels).finish())

    def plain(self) -> Step:
        from lorakit.training.loss import MeanLoss

        return self._by(lambda: MeanLoss("causal")(self.model(**self.inputs), self.labels))

    def exact(self) -> Step:
        return self._chosen(exact(self.model))

    def fractional(self) -> Step:
        return self._chosen(selection(self.model, 0.2, "fractional", "update"))

    def trl(self) -> Step:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(self.model)
        return self._by(lambda: self.model(**self.inputs, labels=self.labels, fused_lm_head=True).loss)

    def liger(self) -> Step:
        from lorakit.settings import Gating, TokenSettings
        from lorakit.tokens import build_tokens

        return self._chosen(build_tokens(Gating(), self.model, "causal", loss=TokenSettings(loss="liger")))


def of_losses(sizes: Sizes, device: str) -> Iterator[Comparison]:
    decoder = sizes.decoders[0]

    def sides(ours: str, theirs: str, targets: float = 1.0) -> Sides:
        steps = Steps(decoder, device, targets)
        return getattr(steps, ours)(), getattr(steps, theirs)()

    def attention() -> Sides:
        return tuple(Steps(decoder, device, attention=name).exact() for name in ("flash_attention_2", "sdpa"))

    for name, goal, needs, *asked in (
        ("exact loss over TRL's", 1.0, "trl", "exact", "trl"),
        ("exact loss over Liger's", 1.1, "liger_kernel", "exact", "liger"),
        ("exact loss over all logits", 1.12, "", "exact", "plain"),
        ("exact loss over all logits, 25 % targets", 0.72, "", "exact", "plain", 0.25),
        ("fractional 20 % by update over the exact loss", 0.55, "", "fractional", "exact"),
        ("fractional 20 % by update over all logits", 0.62, "", "fractional", "plain"),
    ):
        yield Comparison(f"{decoder.name}: {name}", goal, functools.partial(sides, *asked), needs)
    yield Comparison(f"{decoder.name}: flash attention 2 over SDPA, exact loss", NO_TARGET, attention, "flash_attn")


def of_gates(sizes: Sizes, device: str) -> Iterator[Comparison]:
    def sides(case: gate.Case, what: str) -> Sides:
        return gate.sides(gate.Gated(case, device))[what]

    for case in sizes.gated:
        for what in gate.OVER:
            yield Comparison(f"{case.name}: {what}", 1.03, functools.partial(sides, case, what))


def of_savings(sizes: Sizes, device: str) -> Iterator[Comparison]:
    """A cached prefix from its second epoch on, and the best quarter of a batch, as in their own benchmarks."""
    case = sizes.classifier

    def whole() -> nn.Module:
        return lora.build_ours(cache.still(case).to(device)).train()

    def cached() -> Sides:
        model, kept = cache.above(cache.still(case).to(device), 2)
        kept.begin()
        above = cache.step(model, batch_on(device, case), kept)
        above()  # the first epoch
        return above, cache.step(whole(), batch_on(device, case))

    def best() -> Sides:
        batch = batch_on(device, case)
        return examples.Best(whole(), "loss_floor", batch), cache.step(whole(), batch)

    yield Comparison(f"{case.name}, fp32: LoRA above a cached half over LoRA on all blocks", 0.55, cached)
    yield Comparison(f"{case.name}, fp32: the best quarter by loss over LoRA on the whole batch", NO_TARGET, best)


# waits -------------------------------------------------------------------------------------------------


def of_waits(device: str) -> Iterator[Comparison]:
    def decoder(layers: int, adapt: Any = None) -> Steps:
        return Steps(Decoder("", functools.partial(tiny, layers), (2, 16)), device, adapt=adapt)

    def prefix(layers: int) -> Step:
        steps = decoder(layers)
        skip.skipper(steps.model, "prefix")
        return steps.plain()

    def gated(layers: int) -> gate.Gated:
        return gate.Gated(gate.Case("", functools.partial(tiny, layers), (2, 16), 512, "causal", 1, bf16=True), device)

    def accepted(layers: int) -> Step:
        made = gated(layers)
        return lambda: made.look(True).finish().backward()

    steps: dict[str, Callable[[int], Step]] = {
        "LoRA": lambda layers: decoder(layers).plain(),
        "HiRA": lambda layers: decoder(layers, hira.build_ours).plain(),
        "exact loss": lambda layers: decoder(layers).exact(),
        "fractional 20 %": lambda layers: decoder(layers).fractional(),
        "SkipLoRA's prefix": prefix,
        "a rejected batch": lambda layers: functools.partial(gated(layers).look, False),
        "an accepted batch": accepted,
    }
    for what, step in steps.items():
        name = f"waits, {what}: 4 layers over 2"
        yield Comparison(name, 1.0, functools.partial(waits_claim, name, step, device))


def waits_claim(name: str, step: Callable[[int], Step], device: str) -> Claim:
    more, fewer = (waits(step(layers), device) for layers in (4, 2))
    return Claim(name, more, fewer, 1.0, "calls", (1 + more) / (1 + fewer))


def waits(step: Step, device: str) -> int:
    """How often one call reads a value back; AdamW, whose step counters are on the CPU and are read, is not in it."""
    from torch.profiler import ProfilerActivity, profile

    step()  # what is made once
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]) as profiled:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    names = [event.name for event in profiled.events()]
    return sum(name == "aten::_local_scalar_dense" or name.startswith("Memcpy DtoH") for name in names)
