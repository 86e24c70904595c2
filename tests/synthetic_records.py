"""Records made up by formula, for the tests of statistics, figures and tables."""

from __future__ import annotations

import math

from lorakit.records import Costs, Latency, Parameters, Point, Record, SearchPoint

MIB = 2**20


def record(method: str = "lora", seed: int = 0, *, floor: float = 0.4, scale: float = 1.0, points: int = 6, **changes):
    """A finished run whose validation loss is `scale * (floor + 0.3 exp(-step / 20) + 0.01 seed)`."""
    curve = [_point(step, seed, floor, scale, method) for step in range(0, 10 * points + 1, 10)]
    last = curve[-1]
    loss = last.validation["loss"]
    values = {
        "setting": "made-up", "method": method, "seed": seed, "status": "done", "curve": curve,
        "final": {"validation": {"loss": loss}, "test": {"loss": loss + 0.02, "accuracy": _accuracy(floor, seed)}},
        "costs": Costs(steps=last.step, accepted_steps=last.step, tokens=last.tokens, flops=last.flops,
                       seconds=last.seconds, predicted_memory=memory(method)),
        "parameters": Parameters(trainable=1000, total=64_000, nonzero=900, reduction_factor=64.0),
        "adapter_bytes": 3 * MIB // 2,
        "latency": Latency(batch_size=8, tokens=64, unmerged_ms=1.25, merged_ms=1.0),
    }  # fmt: skip
    return Record(**(values | changes))


def _accuracy(floor: float, seed: int) -> float:
    return 0.9 - 0.1 * floor - 0.01 * seed


def _point(step: int, seed: int, floor: float, scale: float, method: str) -> Point:
    loss = scale * (floor + 0.3 * math.exp(-step / 20) + 0.01 * seed)
    tokens = step * (500 + 3 * seed)
    cost = 1.5e9 if method == "full" else 1.0e9
    return Point(
        step=step, accepted_steps=step, tokens=tokens, tokens_backpropagated=tokens, flops=cost * tokens / 500,
        seconds=0.1 * step, train_loss=loss if step else None, validation={"loss": loss, "accuracy": 1 - loss / scale},
    )  # fmt: skip


def memory(method: str = "lora") -> dict[str, int]:
    extra = 100 * MIB if method == "full" else MIB
    kinds = {
        "parameters": 100 * MIB,
        "gradients": extra,
        "optimizer": 2 * extra,
        "activations": 80 * MIB,
        "logits": 5 * MIB,
    }
    return kinds | {"peak": sum(kinds.values())}


def diverged(method: str = "lora", seed: int = 0) -> Record:
    """A run that climbed to a loss of 1e9 and then to NaN, which records hold as null."""
    good = record(method, seed).curve[:4]
    climbing = [
        point.model_copy(update={"validation": {"loss": loss}})
        for point, loss in zip(good, (0.7, 0.9, 50.0, 1e9), strict=True)
    ]
    nothing = good[-1].model_copy(update={"step": 40, "accepted_steps": 40, "train_loss": None, "validation": None})
    return record(method, seed, status="diverged", curve=[*climbing, nothing], final={}, message="train loss is NaN")


def search(method: str = "lora", best: float = 1e-3, seed: int = 0) -> Record:
    """A learning-rate search with its minimum at `best` and everything from 1e-1 on diverged."""
    points = []
    for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        bad = rate >= 0.1
        loss = 0.4 + 0.05 * math.log10(rate / best) ** 2 + 0.01 * seed
        status = "diverged" if bad else "done"
        points.append(SearchPoint(learning_rate=rate, status=status, validation=None if bad else {"loss": loss}))
    return Record(kind="lr_search", setting="made-up", method=method, seed=seed, status="done", search=points)
