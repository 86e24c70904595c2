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


GATES = {"slora": "novelty", "slora50": "novelty", "random50": "random"}  # of rows not called after their gate


def gated(
    method: str = "slora", seed: int = 0, *, floor: float = 0.4, rate: float = 0.3, accepted: int = 120,
    burn_in: int = 20, evaluations: int = 4, redundancy: float = 0.0, logged: bool = True, **changes
):  # fmt: skip
    """A finished run of a row about gates; at rate 1 without one.

    Its validation loss after n accepted steps is `floor + 0.3 exp(-n / 40) + 0.01 seed`. A step's forward costs 1e10
    FLOPs and a second, its backward as much again.
    """
    name = GATES.get(method, method) if rate < 1 else "none"
    curve = [
        _gated_point(round(accepted * n / evaluations), seed, floor, rate, burn_in) for n in range(1, evaluations + 1)
    ]
    last = curve[-1]
    resolved = {"gate": name, "gate_rate": rate if rate < 1 else 0.3, "redundancy": redundancy, "schedule": "linear",
                "model": "a-model", "task": "sst2", "learning_rate": 1e-3, "budget": float(accepted),
                "budget_unit": "accepted_steps"}  # fmt: skip
    loss = last.validation["loss"]
    log = _gate_log(last.step, rate, burn_in, seed) if logged else []
    report = {
        "name": name, "target_rate": rate, "burn_in": burn_in, "acceptance_rate": rate, "warnings": [], "log": log,
    }  # fmt: skip
    values = {
        "setting": "made-up-gates", "method": method, "seed": seed, "status": "done", "curve": curve,
        "resolved": resolved, "details": {"gate": report | {"k": 64, "m": 512}} if rate < 1 else {},
        "final": {"validation": {"loss": loss, "accuracy": 1 - loss}, "test": {"loss": loss, "accuracy": 0.9 - loss}},
        "costs": Costs(steps=last.step, accepted_steps=accepted, tokens=last.tokens, flops=last.flops,
                       flops_forward=1e10 * last.step, flops_backward=1e10 * accepted, seconds=last.seconds),
    }  # fmt: skip
    return Record(**(values | changes))


def _gated_point(accepted: int, seed: int, floor: float, rate: float, burn_in: int) -> Point:
    step = round(accepted if accepted <= burn_in else burn_in + (accepted - burn_in) / rate)
    loss = floor + 0.3 * math.exp(-accepted / 40) + 0.01 * seed
    return Point(
        step=step, accepted_steps=accepted, tokens=100 * step, tokens_backpropagated=100 * accepted,
        flops=1e10 * (step + accepted), seconds=float(step + accepted), train_loss=loss, acceptance_rate=rate,
        validation={"loss": loss, "accuracy": 1 - loss},
    )  # fmt: skip


def _gate_log(steps: int, rate: float, burn_in: int, seed: int) -> list[dict[str, float]]:
    """Every 10 steps: novelty falls from 0.9 to 0.3; the rate swings around its target after the burn-in."""
    log = []
    for step in range(10, steps + 1, 10):
        settled = rate + 0.1 * math.sin(step / 15 + seed) * math.exp(-step / 200)
        log.append({"step": step, "gate/novelty": 0.3 + 0.6 * math.exp(-step / 60) + 0.02 * math.sin(step + seed),
                    "gate/acceptance_rate": settled if step > burn_in else 1.0})  # fmt: skip
    return log


def memory(method: str = "lora") -> dict[str, int]:
    extra = 100 * MIB if method == "full" else MIB
    kinds = {
        "parameters": 100 * MIB, "gradients": extra, "optimizer": 2 * extra, "activations": 80 * MIB, "logits": 5 * MIB,
    }  # fmt: skip
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
