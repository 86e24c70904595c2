"""What paired seeds can tell: Student's one-sided tests, Holm's correction, the smallest effect, the seeds it takes."""

import bisect
import math
from collections.abc import Sequence

import numpy as np

from lorakit.analysis import stats

ALPHA, POWER, ROUNDING = 0.05, 0.8, 1e-9


def below(sample: np.ndarray, limit: float, strict: bool = False) -> tuple[float, float]:
    """One-sided p of Student's t that the mean of `sample` (n,) is below `limit`, and that it is above it.

    What has no spread was counted, not drawn, and is certain; at the limit it is below, unless `strict`.
    """
    from scipy.stats import ttest_1samp

    if np.ptp(sample) <= ROUNDING:
        gap = float(np.mean(sample)) - limit
        return (0.0, 1.0) if gap < -ROUNDING or (gap <= ROUNDING and not strict) else (1.0, 0.0)
    less, greater = (float(ttest_1samp(sample, limit, alternative=side).pvalue) for side in ("less", "greater"))
    return less, greater


def two_sided(differences: Sequence[float]) -> float:
    """p of Student's t that the mean of `differences` (n,) is not 0."""
    sample = np.array(differences)
    return 2 * min(below(sample, 0)) if np.abs(sample).max() > ROUNDING else 1.0


def smallest_effect(spread: float, count: int, alpha: float = ALPHA) -> float:
    """What `count` pairs of standard deviation `spread` tell from none with 80 % power, two-sided at `alpha`."""
    from scipy.special import nctdtrinc, stdtrit

    return float(nctdtrinc(count - 1, 1 - POWER, stdtrit(count - 1, 1 - alpha / 2))) * spread / math.sqrt(count)


def seeds_needed(spread: float, distance: float, alpha: float = ALPHA) -> float:
    """The fewest pairs whose smallest effect is at most `distance`; ∞ from ten thousand on."""
    counts = range(stats.MINIMUM_SEEDS, 10_000)
    place = bisect.bisect_left(counts, True, key=lambda count: smallest_effect(spread, count, alpha) <= distance)
    return counts[place] if place < len(counts) else math.inf


def holm(p_values: Sequence[float], of: int) -> list[float]:
    """Holm's (1979) adjusted p-values, of which there are `of`, some perhaps not known yet and counted as large."""
    ascending, order = np.sort(p_values), np.argsort(p_values)
    return np.maximum.accumulate((of - np.arange(len(order))) * ascending).clip(max=1)[np.argsort(order)].tolist()
