"""A gate of examples: what a step on the best quarter of a batch costs, with and without a cached prefix; its rate."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks._adapters import Case, make_batch, minilm
from benchmarks._common import Claim, interleave, time_claim
from benchmarks.cache import above, flops, step, still
from benchmarks.lora import build_ours
from lorakit.gates import BestRows, build_gate
from lorakit.gates.log import GateLog
from lorakit.head import HeadInput, find_head
from lorakit.seams import Candidate
from lorakit.settings import GateSettings
from lorakit.skip.cache import PrefixCache
from lorakit.training.loss import example_statistics

DESCRIPTION = "the best quarter of a batch (largest loss) against LoRA on all of it, MiniLM dimensions, 128 x 28"
TARGET = (
    "step FLOPs <= 0.76 x LoRA's on the whole candidate batch; on a cached half prefix <= 0.40 x LoRA's without a "
    "cache, <= 0.78 x LoRA's on that cache; share accepted over 2,000 candidate batches within 0.01"
)
CASE, RATIO = Case("MiniLM 128x28", minilm, 128, 28), 4


class Best:
    """A step of `model` on the best quarter of `batch`, as the trainer takes it."""

    def __init__(self, model: nn.Module, name: str, batch: dict[str, torch.Tensor], cache: PrefixCache | None = None):
        settings = GateSettings(gate=name, gate_level="example", gate_candidates=RATIO, gate_k=16)
        self.model, self.cache, self.gate = model.train(), cache, build_gate(settings, model, "classify")
        self.head = HeadInput(find_head(model, "classify")) if self.gate.needs_hidden else None
        self.log, self.batch = GateLog(self.gate), batch
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def told(self, batch: dict[str, torch.Tensor]) -> None:
        if self.cache:
            self.cache.begin_batch(batch)

    def statistics(self, model, inputs, labels):
        logits = model(**inputs).logits
        return example_statistics(logits, labels, "classify"), logits

    def __call__(self) -> None:
        self.told(self.batch)
        seen = self.gate.look(self.model, self.batch, self.statistics)
        rows = self.gate.rows(*seen, self.batch["labels"], self.head)
        best = self.gate.choose(self.batch, rows, self.log, lambda vector: vector)
        self.told(best)
        self.model(**best).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def cost_claims() -> list[Claim]:
    batch = make_batch(CASE)
    plain = step(build_ours(still(CASE)).train(), batch)
    whole = flops(plain)
    claims = []
    for name in ("loss_floor", "novelty"):
        best = Best(build_ours(still(CASE)), name, batch)
        best()
        claims.append(Claim(f"{name}: FLOPs over LoRA's, whole batch", flops(best), whole, 0.76, "GFLOP"))
        claims.append(time_claim(f"{name}: step over LoRA's, whole batch", interleave(best, plain, rounds=10)))
    model, cache = above(still(CASE), 2)
    cache.begin()
    best, same = Best(model, "loss_floor", batch, cache), step(model, batch, cache)
    same(), best()
    claims.append(Claim("cached half: FLOPs over LoRA's without a cache", flops(best), whole, 0.40, "GFLOP"))
    claims.append(Claim("cached half: FLOPs over LoRA's on that cache", flops(best), flops(same), 0.78, "GFLOP"))
    claims.append(time_claim("cached half: step over LoRA's without a cache", interleave(best, plain, rounds=10)))
    claims.append(time_claim("cached half: step over LoRA's on that cache", interleave(best, same, rounds=10)))
    cache.end()
    return claims


def rate_claims() -> list[Claim]:
    """Over a drifting stream: the choice is exact, whatever the scores do."""
    claims, generator = [], torch.Generator().manual_seed(0)
    for rate in (0.1, 0.25, 0.5):
        gate = BestRows(build_gate(GateSettings(gate="loss_floor"), nn.Identity(), "classify"), round(1 / rate))
        log, ids = GateLog(gate), {"input_ids": torch.zeros(20, 1)}
        for number in range(2000):
            losses = torch.randn(20, generator=generator) * (1 + number / 500) - number / 100
            gate.choose(ids, [Candidate(loss, None, None) for loss in losses], log, lambda vector: vector)
        share = log.report()["acceptance_rate"]
        claims.append(Claim(f"share accepted at {rate}: |share - target|", abs(share - rate), 0.01, 1.0, "share"))
    return claims


def run() -> list[Claim]:
    return cost_claims() + rate_claims()
