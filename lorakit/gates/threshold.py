"""Accept with probability σ(β(s − τ)); τ moves until the share accepted is the target: τ ← τ + g·(accepted − target).

s is the score standardised by its running mean and spread: a novelty that varies by 0.02 around 0.95 and a loss that
varies by 0.5 around 2 are thresholded alike, and τ is free to go where a low target needs it. Every decision after the
burn-in moves τ, so the share accepted over T batches differs from the target by exactly (τ_T − τ_0) / (gT) while τ is
inside its limits; an average in the loop would only delay it. The rate that is logged leaves the burn-in out as well.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from lorakit.errors import require
from lorakit.seams import Stateful

LIMIT = 6.0  # τ stays within ±LIMIT spreads of the mean: beyond it a stuck score would wind it up for ever
GAIN = 5.0  # g = GAIN · ema_rate, in spreads of the score
REMEMBERED = 256  # burn-in scores that place the first τ


@dataclass
class RunningScale(Stateful):
    """Running mean and spread of a score; plain averages at first, exponential ones once 1/n falls below `rate`."""

    kept = ("count", "mean", "variance")
    rate: float
    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        weight = max(self.rate, 1 / self.count)
        difference = value - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)

    def standardised(self, value: float) -> float:
        """(value − mean) / spread; 0 while there is no spread."""
        spread = math.sqrt(self.variance)
        return (value - self.mean) / spread if spread > 1e-12 * max(1.0, abs(self.mean)) else 0.0


class ThresholdController(Stateful):
    """Turns scores into acceptance probabilities whose average is `target_rate`.

    Args:
        target_rate: share of batches to accept, in (0, 1).
        steepness: β of the sigmoid, per spread of the score.
        ema_rate: weight of the newest batch in the running averages, in (0, 1]; it also sets the step of τ.
        burn_in: batches at the start that are all accepted.

    Raises:
        ParameterError: a value outside its range.
    """

    kept = ("steps", "deviation", "threshold", "scale", "recent")

    def __init__(self, target_rate: float, *, steepness: float = 10.0, ema_rate: float = 0.02, burn_in: int = 0):
        require(0 < target_rate < 1, "target rate", target_rate, "must be inside (0, 1)")
        require(steepness > 0, "beta", steepness, "must be above 0")
        require(0 < ema_rate <= 1, "ema rate", ema_rate, "must be in (0, 1]")
        require(burn_in >= 0, "burn_in", burn_in, "must be at least 0")
        self.target_rate, self.steepness, self.ema_rate, self.burn_in = target_rate, steepness, ema_rate, burn_in
        self.scale = RunningScale(ema_rate)
        self.threshold = NormalDist().inv_cdf(1 - target_rate)  # in spreads
        self.steps, self.deviation = 0, 0.0
        self.recent: list[float] = []  # scores of the burn-in, the latest of them

    def probability(self, score: float) -> float:
        """Chance of accepting a batch with this score."""
        if self.steps < self.burn_in:
            return 1.0
        if self.scale.variance == 0:
            return self.target_rate
        exponent = self.steepness * (self.scale.standardised(score) - self.threshold)
        return 1 / (1 + math.exp(-exponent)) if exponent > -700 else 0.0

    def observe(self, score: float, accepted: bool) -> None:
        """Learn from one batch: call it once for each, after the decision."""
        if 2 * self.steps >= self.burn_in:  # the first half of a burn-in shows a sketch still filling up
            self.scale.add(score)
        if self.steps < self.burn_in:
            self.recent = [*self.recent, score][-REMEMBERED:]
            if self.steps + 1 == self.burn_in:
                # the target share of the later burn-in scores lies above the first τ
                latest = sorted(self.recent[len(self.recent) // 2 :])
                place = min(len(latest) - 1, int((1 - self.target_rate) * len(latest)))
                self.threshold = min(LIMIT, max(-LIMIT, self.scale.standardised(latest[place])))
                self.recent = []
        else:
            self.deviation += self.ema_rate * (accepted - self.target_rate - self.deviation)
            moved = self.threshold + GAIN * self.ema_rate * (accepted - self.target_rate)
            self.threshold = min(LIMIT, max(-LIMIT, moved))
        self.steps += 1

    def acceptance_rate(self) -> float:
        """Running share accepted since the burn-in's end, all of them counting alike at first; 1 during the burn-in."""
        counted = self.steps - self.burn_in
        if counted <= 0:
            return 1.0
        return self.target_rate + self.deviation / (1 - (1 - self.ema_rate) ** counted)
