"""What a run has come to: what a checkpoint saves and a callback moves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit.gates.log import GateLog
from lorakit.seams import Controller, Gate, TokenSelection
from lorakit.training.costs import FlopMeter, Ledger
from lorakit.training.curve import Curve


@dataclass
class RunState:
    """The parts of a run that change while it trains, beside the weights and the optimizer.

    identity: what makes this run this run; resuming a checkpoint of another identity is refused.
    total_over_ranks: sums a float64 vector over all processes.
    """

    gate: Gate
    tokens: TokenSelection
    controllers: Sequence[Controller]
    gate_log: GateLog
    total_over_ranks: Callable[[Tensor], Tensor]
    ledger: Ledger = field(default_factory=Ledger)
    meter: FlopMeter = field(default_factory=FlopMeter)
    curve: Curve = field(default_factory=Curve)
    identity: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, resumed: bool) -> None:
        """Nothing is left of a step that came to no end; unless resumed, nothing is spent, nothing on the curve."""
        self.ledger.forget()
        if not resumed:
            self.ledger.load_state_dict(Ledger().state_dict())
            self.curve.points, self.curve.best, self.curve.best_step = [], {}, None

    def end(self) -> None:
        """Training is over, for whatever reason: the model is left ready for inference."""
        for controller in self.controllers:
            controller.end()
