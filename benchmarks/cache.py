"""A cached prefix from its second epoch on, against LoRA on every block; its size on disk against what is said."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks._adapters import Case, make_batch
from benchmarks._common import Claim, interleave, time_claim
from benchmarks.lora import ALPHA, CASES, RANK, build_ours
from lorakit.adapters import attach
from lorakit.measure.flops import FlopCount
from lorakit.modules import blocks
from lorakit.skip.cache import PrefixCache, room

DESCRIPTION = "a frozen prefix kept from the first epoch on (half of the blocks, two thirds) against LoRA on all blocks"
TARGET = (
    "half: FLOPs <= 0.50 x, seconds <= 0.55 x; two thirds: 0.34 x, 0.40 x; what rows of SST-2 take on disk is said "
    "beforehand to 2 %"
)
SHARES = {"half": (2, 0.50, 0.55), "two thirds": (3, 0.34, 0.40)}  # name: of how many parts the last is left, targets


def still(case: Case) -> nn.Module:
    """The case's base without dropout: what is drawn anew in every step cannot be kept."""
    torch.manual_seed(0)
    model = case.base()
    for module in model.modules():
        for name in ("p", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def above(model: nn.Module, parts: int) -> tuple[nn.Module, PrefixCache]:
    """LoRA on the last of `parts` equal parts of the blocks, and a cache of what is below them."""
    every = blocks(model)
    left = {id(layer) for block in every[-len(every) // parts :] for layer in block.modules()}
    targets = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in left]
    model = attach(model, "lora", rank=RANK, alpha=ALPHA, target_modules=targets, seed=0).train()
    return model, PrefixCache(model)


def step(model: nn.Module, batch: dict[str, Tensor], cache: PrefixCache | None = None) -> Callable[[], None]:
    """Forward, backward and AdamW of a batch that `cache`, where there is one, is told of."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def run() -> None:
        if cache:
            cache.begin_batch(batch)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def flops(call: Callable[[], None]) -> float:
    with FlopCount() as count:
        call()
    return count.total / 1e9


def claims_of(case: Case) -> list[Claim]:
    batch, claims = make_batch(case), []
    plain = step(build_ours(still(case)).train(), batch)
    for name, (parts, of_flops, of_seconds) in SHARES.items():
        model, cache = above(still(case), parts)
        cache.begin()
        cached = step(model, batch, cache)
        cached()  # the first epoch
        claims.append(Claim(f"{case.name}, {name}: FLOPs", flops(cached), flops(plain), of_flops, "GFLOP"))
        claims.append(time_claim(f"{case.name}, {name}: step", interleave(cached, plain, rounds=20), of_seconds))
        cache.end()
    return claims


def size_claim() -> Claim | None:
    """Of 8,192 of SST-2's training rows as `sst2-minilm-compare` reads them; None without the data."""
    from lorakit import models, tasks

    if not (Path(os.environ.get("LORAKIT_DATA", "")) / "sst2").is_dir():
        print("SST-2 is not here (LORAKIT_DATA): the size of its cache is not measured")
        return None
    task = tasks.load("sst2", models.tokenizer("all-MiniLM-L6-v2"), max_length=64, max_train=8192)
    model, _ = above(still(CASES[0]), 2)
    with tempfile.TemporaryDirectory() as folder:
        said, _ = room(task.train["input_ids"], model, Path(folder))
        cache = PrefixCache(model, Path(folder))
        cache.begin()
        with torch.no_grad():
            for first in range(0, len(task.train), 256):
                batch = task.collator([task.train[n] for n in range(first, min(first + 256, len(task.train)))])
                cache.begin_batch(batch)
                model(**batch)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    return Claim(f"{len(task.train):,} rows of SST-2: on disk over said", size / 2**30, said / 2**30, 1.02, "GiB")


def run() -> list[Claim]:
    return [claim for case in CASES for claim in claims_of(case)] + [claim for claim in [size_claim()] if claim]
