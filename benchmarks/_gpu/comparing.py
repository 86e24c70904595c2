"""A comparison on a device: what it is called, what would keep the claim, how it is made; and a list of them tried."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import gate
from benchmarks._adapters import Case, distilbert
from benchmarks._common import Claim, interleave, seconds, time_claim, told
from benchmarks._decoders import gemma, gemma_1b, gemma_270m

MINUTES = 8  # a part takes at most
LAST_START = 0.85 * MINUTES * 60  # seconds after which no comparison is begun
Step = Callable[[], object]
Sides = tuple[Step, Step]


@dataclass(frozen=True)
class Decoder:
    """A language model with random weights of a real one's dimensions, and the shape of its batches."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """What a page is measured on: a classifier, what is gated, decoders (the first is timed); how often it is timed."""

    classifier: Case
    gated: tuple[gate.Case, ...]
    decoders: tuple[Decoder, ...]
    rounds: int
    warmup: int


def tiny(layers: int = 2) -> nn.Module:
    return gemma(32, 64, layers, vocabulary=512)


def tiny_classifier() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64))


REAL = Sizes(
    Case("DistilBERT 64x128", distilbert, 64, 128),
    (gate.MINILM, gate.CHATS),
    (Decoder("Gemma 270M 4x1024", gemma_270m, (4, 1024)), Decoder("Gemma 1B 2x1024", gemma_1b, (2, 1024))),
    rounds=20,
    warmup=3,
)
TINY = Sizes(
    Case("tiny DistilBERT 2x8", tiny_classifier, 2, 8),
    (
        gate.Case("tiny DistilBERT 2x8", tiny_classifier, (2, 8), 30_000, "classify", 1),
        gate.Case("tiny Gemma 2x16 bf16", tiny, (2, 16), 512, "causal", 1, bf16=True),
    ),
    (Decoder("tiny Gemma 2x16", tiny, (2, 16)),),
    rounds=1,
    warmup=0,
)


@dataclass(frozen=True)
class Comparison:
    """A claim that is still to be measured.

    Args:
        name, target: see `Claim`; measure: makes it, or the two sides that are timed in turn.
        needs: a module of another project, without which it is skipped.
    """

    name: str
    target: float
    measure: Callable[[], Claim | Sides]
    needs: str = ""


def tried(comparisons: Sequence[Comparison], sizes: Sizes, device: str) -> dict[str, Any]:
    """Every comparison that could be made, and why the others could not, by their names."""
    claims, missing, start = [], {}, time.monotonic()
    for one in comparisons:
        late = time.monotonic() - start > LAST_START
        found = f"skipped: the part's {MINUTES} minutes were over" if late else _tried(one, sizes, device)
        if isinstance(found, Claim):
            claims.append(told(found))
            found = f"{found.ratio:.3f} {found.verdict}"
        else:
            missing[one.name] = found
        print(f"{one.name}: {found}", flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"claims": claims, "not_measured": missing}


def _tried(one: Comparison, sizes: Sizes, device: str) -> Claim | str:
    """The claim, or why there is none: one that fails takes no other with it."""
    if one.needs and importlib.util.find_spec(one.needs) is None:
        return f"skipped: {one.needs} is not installed"
    try:
        made = one.measure()
        if isinstance(made, Claim):
            return made
        clock = cuda_seconds if device == "cuda" else seconds
        return time_claim(one.name, interleave(*made, sizes.rounds, sizes.warmup, clock), one.target)
    except torch.cuda.OutOfMemoryError:
        return f"skipped: too small ({gib():.1f} GiB)"
    except ImportError as error:
        return f"skipped: {error}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def cuda_seconds(call: Step) -> float:
    """Seconds between two events of the GPU: from when it had nothing to do until `call` and all it began is done."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    call()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def gib() -> float:
    """Of the card's memory."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
