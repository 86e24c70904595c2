"""A claim is a ratio, ours over theirs, that must not exceed its target.

A benchmark is a module here with `DESCRIPTION` (what is compared), `TARGET` (in words) and `run() -> list[Claim]`.
What `save` writes of one is what README's numbers are read from (`tests/test_readme.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

NO_TARGET = float("inf")  # of a number to know, which claims nothing


@dataclass(frozen=True)
class Claim:
    """One comparison.

    Args:
        name: what was compared, as the table shows it.
        ours, theirs: the two sides, in `unit`.
        target: the largest ratio that keeps the claim; without one the ratio is a number to know.
        unit: of the two sides: "ms", "MiB", "GFLOP", "nats" …
        measured_ratio: where the ratio is not `ours / theirs`, such as a median of pairwise ratios.
    """

    name: str
    ours: float
    theirs: float
    target: float = NO_TARGET
    unit: str = ""
    measured_ratio: float | None = None

    @property
    def ratio(self) -> float:
        if self.measured_ratio is not None:
            return self.measured_ratio
        return self.ours / self.theirs if self.theirs else float("inf")

    @property
    def ok(self) -> bool:
        return self.ratio <= self.target  # a NaN ratio misses

    @property
    def verdict(self) -> str:
        return "missed" if not self.ok else "ok" if self.target < NO_TARGET else ""


@dataclass(frozen=True)
class Timing:
    """Two sides timed in turn: median seconds of each, and the median over rounds of ours / theirs."""

    ours: float
    theirs: float
    ratio: float
    rounds: int


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


Clock = Callable[[Callable[[], object]], float]  # seconds of one call


def interleave(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int = 20,
    warmup: int = 3,
    clock: Clock = seconds,
) -> Timing:
    """Time `ours` and `theirs` in turn, so that a slow moment of the machine falls on both.

    The order changes every round; the ratio is the median of the rounds' own ratios. Garbage is collected between
    rounds, not inside them.
    """
    for _ in range(warmup):
        ours(), theirs()
    pairs = [_round(ours, theirs, clock, ours_first=index % 2 == 0) for index in range(rounds)]
    mine, other = zip(*pairs, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return Timing(statistics.median(mine), statistics.median(other), ratio, rounds)


def _round(
    ours: Callable[[], object], theirs: Callable[[], object], clock: Clock, ours_first: bool
) -> tuple[float, float]:
    gc.collect()
    gc.disable()
    try:
        if ours_first:
            return clock(ours), clock(theirs)
        other = clock(theirs)
        return clock(ours), other
    finally:
        gc.enable()


def keep_memory() -> None:
    """Let glibc keep what is freed; elsewhere this does nothing.

    A language model's logits take a gigabyte. By default that goes back to the system, and clearing its pages anew at
    every step takes longer, and varies more, than what is measured.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never cut


def time_claim(name: str, timing: Timing, target: float = NO_TARGET) -> Claim:
    """A claim on `timing`, in milliseconds, its ratio the median of the rounds' ratios."""
    return Claim(name, timing.ours * 1e3, timing.theirs * 1e3, target, "ms", timing.ratio)


def worst(claims: Sequence[Claim]) -> Claim:
    """The claim closest to its target, or furthest beyond it; a NaN ratio is the worst of all."""
    return max(claims, key=lambda claim: (claim.ratio != claim.ratio, claim.ratio / claim.target))


def table(claims: Sequence[Claim]) -> str:
    """One line per claim."""
    width = max(len("claim"), *(len(claim.name) for claim in claims))
    lines = [f"{'claim':{width}s}  {'ours':>12s} {'theirs':>12s} {'unit':6s} {'ratio':>7s} {'target':>7s}"]
    lines += [
        f"{claim.name:{width}s}  {claim.ours:12.4f} {claim.theirs:12.4f} {claim.unit:6s} "
        f"{claim.ratio:7.4f} {claim.target:7.4f} {claim.verdict}".rstrip()
        for claim in claims
    ]
    return "\n".join(lines)


def last_line(name: str, claims: Sequence[Claim]) -> str:
    """`NAME: <ratio> (target <target>) ok|missed`, of the worst claim."""
    claim = worst(claims)
    return f"{name}: {claim.ratio:.4f} (target {claim.target:.4f}) {claim.verdict}"


def told(claim: Claim) -> dict[str, object]:
    """A claim as a file holds it; a number JSON does not have is null."""
    sides = {side: getattr(claim, side) for side in ("ours", "theirs", "ratio", "target")}
    finite = {side: value if math.isfinite(value) else None for side, value in sides.items()}
    return {"name": claim.name, "unit": claim.unit, "ok": claim.ok} | finite


def save(name: str, claims: Sequence[Claim], path: Path) -> None:
    """Write what was measured, when and with what, whole or not at all."""
    from lorakit.measure.environment import environment

    where = environment()
    measured = {"benchmark": name, "date": today(), "claims": [told(claim) for claim in claims]}
    measured |= {what: where[what] for what in ("cpu", "cpus", "threads")}
    measured["versions"] = {package: where["versions"][package] for package in ("torch", "transformers", "peft")}
    write_json(measured, path)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def write_json(value: object, path: Path) -> None:
    from lorakit.files import write_text

    write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", path)
