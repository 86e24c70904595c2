"""SkipLoRA: an adapter with a small update, M = ‖Δh‖₂ / ‖h‖₂ < τ, is detached: its backward is not done.

h is the base layer's output and Δh the adapter's, both over the batch's valid tokens. Detaching scattered adapters
saves next to nothing, because the gradient still flows through the frozen layers to the first active one; detaching a
*prefix* ends the backward pass early. Related: AutoFreeze (Liu et al. 2021) and Egeria (Wang et al. 2023) freeze
prefixes, LoRA-drop (Zhou et al. 2024) ranks adapters by their outputs, LISA (Pan et al. 2024) draws layers at random.
"""

import re
from collections.abc import Sequence

import torch
from torch import Generator

from lorakit.settings import SkipSettings

NUMBERED = re.compile(r"(.*?\.)?\d+(?=\.|$)")  # of a path the parts up to the first that is a number

# which adapters -------------------------------------------------------------------------------------


def choose(metric: Sequence[float], blocks: Sequence[int], settings: SkipSettings, generator: Generator) -> list[bool]:
    """Which adapters are active, from M of each (L,) and the block each is in (L,), both in forward order.

    Always draws the same count of random numbers, so that every process that has the same generator agrees.
    """
    draws = torch.rand(len(metric), generator=generator).tolist()
    if settings.skip == "prefix" and draws[0] < settings.skip_explore:
        return [True] * len(metric)
    if settings.skip == "prefix":
        return _all_but_prefix(metric, blocks, settings)
    tau = threshold(metric, settings)
    active = [m >= tau or draw < settings.skip_explore for m, draw in zip(metric, draws, strict=True)]
    largest = sorted(range(len(metric)), key=lambda place: metric[place], reverse=True)
    for place in largest[: settings.skip_min_active]:
        active[place] = True
    return active


def _all_but_prefix(metric: Sequence[float], blocks: Sequence[int], settings: SkipSettings) -> list[bool]:
    if settings.skip_share:
        skipped = int(settings.skip_share * (max(blocks) + 1) + 1e-9)
    else:
        large = [block for m, block in zip(metric, blocks, strict=True) if m >= settings.skip_threshold]
        skipped = min(large, default=max(blocks) + 1)
    while skipped and sum(block >= skipped for block in blocks) < settings.skip_min_active:
        skipped -= 1
    return [block >= skipped for block in blocks]


def threshold(metric: Sequence[float], settings: SkipSettings) -> float:
    """τ: the fixed one, or the value that `settings.skip_share` of `metric`, rounded down, lie below.

    While nothing is measured it is the fixed one.
    """
    if not settings.skip_share or not metric:
        return settings.skip_threshold
    return sorted(metric)[int(settings.skip_share * len(metric) + 1e-9)]


def block_numbers(paths: Sequence[str]) -> list[int]:
    """The transformer block of each adapter, counted from 0 in forward order; a layer outside is a block of its own."""
    names = [found[0] if (found := NUMBERED.match(path)) else path for path in paths]
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names]
