"""What a gate did, under the names its description gives them, and warnings where it does not do what it should."""

import warnings
from typing import Any

from lorakit.seams import Gate, Stateful

PATIENCE = 50  # decisions after the burn-in before a rate counts as stuck
FALLING = 0.98  # of the novelty at the start; a basis that takes anything in brings it below


class GateWarning(UserWarning):
    """The gate runs, but not as it should."""


class GateLog(Stateful):
    """Collects decisions; a `point` sums up those since the last one. Each warning is given once.

    Attributes:
        points: mappings with "step" and `gate/novelty` (the mean raw score, whatever the gate scores by),
            `gate/accept` (share accepted since the last point), `gate/acceptance_rate` (running, after the burn-in),
            `gate/accepted_steps`, `gate/total_steps`.
        decisions: accepted or not, of every window so far; warnings: those given so far.
    """

    kept = ("points", "warnings", "decisions", "_scores", "_accepted", "_early")

    def __init__(self, gate: Gate):
        self.gate, self.points, self.warnings = gate, [], []
        self.decisions: list[bool] = []
        self._scores: list[float] = []
        self._accepted: list[bool] = []
        self._early: list[float | None] = []  # scores of the first burn-in batches

    def decided(self, accept: bool, score: float | None) -> None:
        """One window was accepted or rejected."""
        self._accepted.append(accept)
        self.decisions.append(accept)
        if score is not None:
            self._scores.append(score)
        counted = len(self.decisions) - self.gate.burn_in
        if counted <= 0:
            self._early += [] if score is None else [score]
            if counted == 0:
                self._check_novelty()
            return
        expected = 1 - self.gate.target_rate if accept else self.gate.target_rate  # share of the other decision
        row = int(PATIENCE + 10 / expected) if expected else counted + 1
        if self.gate.candidates == 1 and counted >= row and {*self.decisions[-row:]} == {accept}:
            stuck = f"acceptance is stuck at {'100 %' if accept else '0 %'}: {row} batches in a row"
            self.warn(f"{stuck} after the burn-in, for a target rate of {self.gate.target_rate}")

    def _check_novelty(self) -> None:
        if not self.gate.scores_novelty or len(self._early) < 8:
            return
        quarter = len(self._early) // 4
        late = sum(self._early[-quarter:]) / quarter
        if late > max(FALLING, 1 - self.gate.k / self.gate.m / 4):
            told = f"novelty is not falling: {late:.3f} after a burn-in of {self.gate.burn_in} batches"
            self.warn(f"{told}; the basis (k={self.gate.k}) holds nothing that new batches share")

    def begin(self, total_steps: float | None) -> None:
        """Training starts; `total_steps` batches are planned, None where that is not known."""
        if total_steps is not None and self.gate.burn_in >= total_steps:
            told = f"burn_in={self.gate.burn_in} is as long as the run ({total_steps:.0f} steps) or longer"
            self.warn(f"{told}: every batch will be accepted")
        size, rank = (getattr(self.gate, name, None) for name in "mk")
        if size and rank and 2 * rank > size:
            told = f"a basis of k={rank} directions takes up {rank / size:.0%} of a sketch of m={size}"
            then = f"so that even unrelated gradients look redundant; use m of at least {2 * rank}"
            self.warn(f"the sketch is small for the rank: {told}, {then}")
        if self.gate.scores_novelty and self.gate.k >= (room := self.gate.d_hidden * (self.gate.vocab_size - 1)):
            space = f"a space of {room} ({self.gate.d_hidden} x {self.gate.vocab_size - 1})"
            told = f"k={self.gate.k} directions of {space}; nothing stays novel, so use a smaller k"
            self.warn(f"the basis can hold every gradient of this head: {told}")

    def warn(self, text: str) -> None:
        """Give a warning and keep it for the record."""
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(text, GateWarning, stacklevel=2)

    def point(self, step: int, accepted_steps: int) -> dict[str, float]:
        """Metrics since the last point, which they are kept as."""
        seen = {"gate/novelty": self._scores, "gate/accept": self._accepted}
        found = {name: sum(values) / len(values) for name, values in seen.items() if values}
        found |= {"gate/acceptance_rate": self.gate.acceptance_rate()}
        found |= {"gate/accepted_steps": accepted_steps, "gate/total_steps": step}
        self._scores, self._accepted = [], []
        self.points.append({"step": step, **found})
        return found

    def report(self) -> dict[str, Any]:
        """What the record keeps: the gate's settings, its rate after the burn-in, warnings, all points."""
        counted = self.decisions[self.gate.burn_in :]
        rate = {"acceptance_rate": sum(counted) / len(counted) if counted else None, "decisions": len(self.decisions)}
        return self.gate.report() | rate | {"warnings": [*self.warnings], "log": [*self.points]}
