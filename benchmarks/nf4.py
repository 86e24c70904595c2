"""An NF4 base: bits per linear weight on real dimensions, and what 4 bits cost in training loss on the same steps.

The loss is compared after 200 steps with a run's schedule: the adapters first have to make up for the rounded weights
(after 60 steps QLoRA's loss was 4 % above LoRA's on two seeds of MiniLM).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks._common import Claim, interleave
from lorakit import adapters, models, tasks
from lorakit.measure.memory import predict_step_memory
from lorakit.measure.weights import FOUR_BIT, weight_table
from lorakit.runs.plan import build, quantize_meta

DESCRIPTION = "NF4 base: bits per linear weight of real models, and QLoRA's training loss against LoRA's on equal steps"
TARGET = (
    "linear weights <= 4.2 bits per parameter; mean loss over the last third of the steps <= 1.02 x LoRA's (MiniLM)"
)
MODELS = {"all-MiniLM-L6-v2": "classify", "distilbert-base-uncased": "classify", "gemma-3-270m": "causal"}
STEPS, WARMUP, BATCH, SEEDS = 200, 10, 16, (0, 1)


@dataclass(frozen=True)
class Case:
    """A classifier with trained weights, its task, and the learning rate of both sides."""

    model: str
    task: str
    rate: float


MINILM, TOY = Case("all-MiniLM-L6-v2", "reviews", 1e-3), Case("toy-encoder", "toy-reviews", 4e-3)


def run() -> list[Claim]:
    claims = [claim for name, kind in MODELS.items() for claim in bits_claims(name, kind)] + [loss_claim(MINILM)]
    print(f"{TOY.model}, QLoRA / LoRA: loss {loss_claim(TOY).ratio:.3f} (4 bits cost a very small model more)")
    report_costs(MINILM)
    return claims


def bits_claims(name: str, kind: str) -> list[Claim]:
    """Made on the meta device, which tests hold to the bytes that bitsandbytes stores."""
    model = build(models.config(name), kind, "bf16")
    quantize_meta(model)
    table = weight_table(model)
    linear = next(row for row in table["rows"] if row["kind"] == FOUR_BIT)
    base = table["base"]
    return [
        Claim(f"{name}: bits per linear weight", linear["bits_per_parameter"], 4.2, 1.0, "bits"),
        Claim(f"{name}: parameters in linear layers", linear["parameters"] / 1e6, base["parameters"] / 1e6, unit="M"),
        Claim(f"{name}: whole model over fp16", base["bits_per_parameter"], 16.0, unit="bits"),
    ]


def loss_claim(case: Case) -> Claim:
    """Mean losses over the last third of the steps and over the seeds."""
    packed, dense = (statistics.fmean(last_third(case, side, seed) for seed in SEEDS) for side in (True, False))
    return Claim(f"{case.model}: loss, last third of {STEPS} steps, {len(SEEDS)} seeds", packed, dense, 1.02, "nats")


def last_third(case: Case, quantised: bool, seed: int) -> float:
    """Mean training loss of one run; both sides of a seed see the same batches and dropout masks."""
    model, batches = prepared(case, quantised, seed)
    step = stepper(model, case.rate)
    losses = []
    for index, batch in enumerate(batches):
        torch.manual_seed(STEPS * seed + index)
        losses.append(step(batch))
    return statistics.fmean(losses[-STEPS // 3 :])


def prepared(case: Case, quantised: bool, seed: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model with adapters drawn from `seed`, and STEPS batches in the order `seed` gives."""
    loaded = models.load(case.model, "classify", seed=seed)
    task = read_task(case)
    model = adapters.quantize_nf4(loaded.model) if quantised else loaded.model
    order = torch.randint(len(task.train), (STEPS, BATCH), generator=torch.Generator().manual_seed(seed))
    batches = [task.collator([task.train[int(row)] for row in rows]) for rows in order]
    return adapters.attach(model, seed=seed), batches


@functools.cache
def read_task(case: Case) -> Any:
    return tasks.load(
        case.task, models.tokenizer(case.model), kind_of_model="encoder", max_length=32, max_train=STEPS * BATCH
    )


def learning_rate(step: int) -> float:
    """Linear warm-up and decay, as in a run: at a constant rate the losses of single runs are a matter of chance."""
    return max(0.0, min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP)))


def stepper(model: nn.Module, rate: float) -> Callable[[dict[str, Any]], float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)

    def step(batch: dict[str, Any]) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def report_costs(case: Case) -> None:
    """Printed, without a target: what else changes."""
    (packed, batches), (dense, _) = (prepared(case, quantised, seed=0) for quantised in (True, False))
    peaks = [predict_step_memory(model, batches[0])["peak"] for model in (packed, dense)]
    steps = [stepper(model, case.rate) for model in (packed, dense)]
    timing = interleave(lambda: steps[0](batches[0]), lambda: steps[1](batches[0]), rounds=10)
    error = adapters.requantisation_error(packed)["overall"]
    print(
        f"{case.model}, QLoRA / LoRA: predicted peak memory {peaks[0] / peaks[1]:.2f}, step time {timing.ratio:.2f}\n"
        f"{case.model}: quantising the merged weights again changes them by {error:.1%}"
    )
