"""A budget is an amount of anything a run can spend; the learning rate follows the share already spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from lorakit.errors import require
from lorakit.params import BudgetUnit
from lorakit.training.costs import Ledger

UNITS = get_args(BudgetUnit)
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Budget:
    """`amount` of `unit`; the run ends with the step that spends the last of it.

    Raises:
        ParameterError: amount below 1, or a unit that is not one of `UNITS`.
    """

    amount: float
    unit: str = "accepted_steps"

    def __post_init__(self) -> None:
        require(self.unit in UNITS, "budget_unit", self.unit, f"must be one of {', '.join(UNITS)}")
        require(self.amount >= 1, "budget", self.amount, "must be at least 1")

    def share(self, ledger: Ledger) -> float:
        """Share of the budget spent, 0 at the start, at least 1 at the end."""
        return getattr(ledger, self.unit) / self.amount

    def steps(self) -> float | None:
        """Steps an ungated run of this budget takes; None where that is not counted in steps."""
        return self.amount if self.unit in ("steps", "accepted_steps") else None


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor as a function of the share of the budget spent.

    Rises linearly from a tenth over the first `warmup` share, then decays to 0 at share 1 (or stays: "constant").
    """

    name: str = "linear"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        require(self.name in SCHEDULES, "schedule", self.name, f"must be one of {', '.join(SCHEDULES)}")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "must be a share of the budget in [0, 1)")

    def factor(self, share: float) -> float:
        if share < self.warmup:
            return 0.1 + 0.9 * share / self.warmup
        if self.name == "constant":
            return 1.0
        left = max(0.0, 1 - (share - self.warmup) / (1 - self.warmup))
        return left if self.name == "linear" else 0.5 * (1 - math.cos(math.pi * left))
