"""SkipLoRA: an adapter with a small update, M = ‖Δh‖₂ / ‖h‖₂ < τ, is detached: its backward is not done.

h is the base layer's output and Δh the adapter's, both over the batch's valid tokens. Detaching scattered adapters
saves next to nothing, because the gradient still flows through the frozen layers to the first active one; detaching a
*prefix* ends the backward pass early. Related: AutoFreeze (Liu et al. 2021) and Egeria (Wang et al. 2023) freeze
prefixes, LoRA-drop (Zhou et al. 2024) ranks adapters by their outputs, LISA (Pan et al. 2024) draws layers at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from lorakit.errors import require

MODES, DECIDES = ("adapter", "prefix"), ("ema", "forward")


@dataclass(frozen=True)
class SkipSettings:
    """When an adapter is skipped.

    Args:
        mode: "adapter": each one whose M is below the threshold; "prefix": the transformer blocks from the first on as
            long as every adapter in them is below it, which is what shortens the backward pass.
        decide: "ema": before the forward, from a moving average of earlier steps; "forward": from the step's own M,
            as each adapter is reached, which costs a synchronisation per adapter on a GPU.
        threshold: τ, used where `share` is 0.
        share: of adapters to skip: τ is then that quantile of the current M. Of a prefix it is the share of blocks,
            the lowest, whatever they measure: no threshold on a running maximum could tell them otherwise.
        warmup: share of the budget before the first skip. With B = 0 at the start every M is 0.
        min_active: adapters that stay active, those with the largest M (prefix: the last).
        explore: chance per step that a skipped adapter (prefix: the whole prefix) is trained all the same.
        ema: weight of the newest measurement.
        measure_every: steps between measurements where `decide` is "ema".

    Raises:
        ParameterError: naming the run's parameter, `skip` or `skip_…`.
    """

    mode: str = "prefix"
    decide: str = "ema"
    threshold: float = 0.05
    share: float = 0.0
    warmup: float = 0.1
    min_active: int = 1
    explore: float = 0.05
    ema: float = 0.2
    measure_every: int = 4

    def __post_init__(self) -> None:
        require(self.mode in MODES, "skip", self.mode, f"must be one of {', '.join(MODES)}")
        require(self.decide in DECIDES, "skip_decide", self.decide, f"must be one of {', '.join(DECIDES)}")
        require(self.threshold >= 0, "skip_threshold", self.threshold, "must be at least 0")
        require(0 <= self.share < 1, "skip_share", self.share, "must be in [0, 1)")
        require(0 <= self.warmup < 1, "skip_warmup", self.warmup, "must be a share of the run in [0, 1)")
        require(self.min_active >= 1, "skip_min_active", self.min_active, "must be at least 1")
        require(0 <= self.explore <= 1, "skip_explore", self.explore, "must be in [0, 1]")
        require(0 < self.ema <= 1, "skip_ema", self.ema, "must be in (0, 1]")
        require(self.measure_every >= 1, "skip_measure_every", self.measure_every, "must be at least 1")


# which adapters -------------------------------------------------------------------------------------


def choose(metric: Sequence[float], blocks: Sequence[int], settings: SkipSettings, generator: Generator) -> list[bool]:
    """Which adapters are active, from M of each (L,) and the block each is in (L,), both in forward order.

    Always draws the same count of random numbers, so that every process that has the same generator agrees.
    """
    draws = torch.rand(len(metric), generator=generator).tolist()
    if settings.mode == "prefix":
        return _all_but_prefix(metric, blocks, settings, explored=draws[0] < settings.explore)
    tau = threshold(metric, settings)
    active = [m >= tau or draw < settings.explore for m, draw in zip(metric, draws, strict=True)]
    largest = sorted(range(len(metric)), key=lambda place: metric[place], reverse=True)
    for place in largest[: settings.min_active]:
        active[place] = True
    return active


def _all_but_prefix(
    metric: Sequence[float], blocks: Sequence[int], settings: SkipSettings, explored: bool
) -> list[bool]:
    if explored:
        return [True] * len(metric)
    per_block = running_maxima(metric, blocks)
    if settings.share:
        skipped = _count(settings.share, len(per_block))
    else:
        skipped = sum(m < settings.threshold for m in per_block)
    while sum(block >= skipped for block in blocks) < settings.min_active:
        skipped -= 1
    return [block >= skipped for block in blocks]


def running_maxima(metric: Sequence[float], blocks: Sequence[int]) -> list[float]:
    """The largest M in each block or before it: below τ exactly where the whole prefix up to there is."""
    maxima, largest = [], 0.0
    for block in range(max(blocks) + 1):
        largest = max(largest, *(m for m, own in zip(metric, blocks, strict=True) if own == block))
        maxima.append(largest)
    return maxima


def threshold(metric: Sequence[float], settings: SkipSettings) -> float:
    """τ: the fixed one, or the value that `settings.share` of `metric`, rounded down, lie below."""
    if not settings.share:
        return settings.threshold
    return sorted(metric)[_count(settings.share, len(metric))]


def _count(share: float, total: int) -> int:
    return int(share * total + 1e-9)


def block_numbers(paths: Sequence[str]) -> list[int]:
    """The transformer block of each adapter, counted from 0 in forward order; a layer outside is a block of its own."""
    names = []
    for path in paths:
        parts = path.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        names.append(".".join(parts[: number + 1]))
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names]
