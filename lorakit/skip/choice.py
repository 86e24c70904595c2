"""SkipLoRA: an adapter with a small update, M = ‖Δh‖₂ / ‖h‖₂ < τ, is detached: its backward is not done.

h is the base layer's output and Δh the adapter's, both over the batch's valid tokens. Detaching scattered adapters
saves next to nothing, because the gradient still flows through the frozen layers to the first active one; detaching a
*prefix* ends the backward pass early. Related: AutoFreeze (Liu et al. 2021) and Egeria (Wang et al. 2023) freeze
prefixes, LoRA-drop (Zhou et al. 2024) ranks adapters by their outputs, LISA (Pan et al. 2024) draws layers at random.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator

from lorakit.modules import fullmatch, name_matches
from lorakit.settings import SkipSettings

NUMBERED = re.compile(r"(.*?\.)?\d+(?=\.|$)")  # of a path the parts up to the first that is a number

# which adapters -------------------------------------------------------------------------------------


def choose(
    metric: Sequence[float], blocks: Sequence[int], settings: SkipSettings, generator: Generator, paths: Any = ()
) -> list[bool]:
    """Which adapters are active, from M of each (L,), the block each is in and its path (L,), all in forward order.

    Always draws the same count of random numbers, so that every process that has the same generator agrees.
    """
    draws = torch.rand(len(metric), generator=generator).tolist()
    paths = paths if isinstance(settings.skip_threshold, dict) else ()  # else one threshold, found once a step
    taus = [threshold(metric, settings, path) for path in paths] or [threshold(metric, settings)] * len(metric)
    large = [m >= tau for m, tau in zip(metric, taus, strict=True)]
    if settings.skip == "prefix":
        return [draws[0] < settings.skip_explore or on for on in _all_but_prefix(large, blocks, settings)]
    active = [is_large or draw < settings.skip_explore for is_large, draw in zip(large, draws, strict=True)]
    for place in sorted(range(len(metric)), key=metric.__getitem__, reverse=True)[: settings.skip_min_active]:
        active[place] = True
    return active


def _all_but_prefix(large: Sequence[bool], blocks: Sequence[int], settings: SkipSettings) -> list[bool]:
    if settings.skip_share:
        skipped = int(settings.skip_share * (max(blocks) + 1) + 1e-9)
    else:
        skipped = min((block for block, m in zip(blocks, large, strict=True) if m), default=max(blocks) + 1)
    while skipped and sum(block >= skipped for block in blocks) < settings.skip_min_active:
        skipped -= 1
    return [block >= skipped for block in blocks]


def threshold(metric: Sequence[float], settings: SkipSettings, path: str = "") -> float:
    """τ of the adapter at `path`: the fixed one, or the value that `settings.skip_share` of `metric` lie below.

    Of a mapping that of the first name that is the path, or its end, or a regular expression of it; else 0.
    """
    if settings.skip_share and metric:
        return sorted(metric)[int(settings.skip_share * len(metric) + 1e-9)]
    fixed = settings.skip_threshold
    return next((fixed[name] for name in fixed if named(name, path)), 0.0) if isinstance(fixed, dict) else fixed


def named(name: str, path: str) -> bool:
    """Whether `name` is the path, or the end of it, or a regular expression that matches all of it."""
    return name_matches(name, path) or fullmatch(name, path, "skip_threshold")


def block_numbers(paths: Sequence[str]) -> list[int]:
    """The transformer block of each adapter, counted from 0 in forward order; a layer outside is a block of its own."""
    names = [found[0] if (found := NUMBERED.match(path)) else path for path in paths]
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names]
