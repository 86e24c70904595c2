"""Gates that need no sketch: accept at random, or by a score thresholded to a rate; the loss is such a score."""

from abc import ABC, abstractmethod
from typing import Self

import torch

from lorakit.errors import require
from lorakit.gates.threshold import ThresholdController
from lorakit.seams import GATES, Candidate, Decision, Gate
from lorakit.settings import GateSettings


class RandomGate(Gate):
    """Accepts each batch with probability `target_rate`: what every other gate has to beat at the same rate.

    Args:
        target_rate: in (0, 1); burn_in: batches at the start that are all accepted, as the other gates do.
        seed: of the coin.
    """

    name, selective, looks = "random", True, False
    kept = ("steps", "accepted", "generator")

    def __init__(self, target_rate: float, *, burn_in: int = 0, seed: int = 0):
        require(0 < target_rate < 1, "target rate", target_rate, "must be inside (0, 1)")
        require(burn_in >= 0, "burn_in", burn_in, "must be at least 0")
        self.target_rate, self.burn_in = target_rate, burn_in
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = self.accepted = 0

    @classmethod
    def from_settings(cls, settings: GateSettings, model: torch.nn.Module, kind: str, seed: int) -> Self:
        return cls(settings.gate_rate, burn_in=settings.gate_burn_in, seed=seed)

    def score(self, measured: torch.Tensor) -> None:
        """There is none."""

    def learn(self, measured: torch.Tensor) -> None:
        """There is nothing to learn."""

    def preference(self, score: None, measured: torch.Tensor) -> float:
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def decide(self, measured: torch.Tensor) -> Decision:
        accept = True
        if self.steps >= self.burn_in:
            accept = self.preference(None, measured) < self.target_rate
            self.accepted += accept
        self.steps += 1
        return Decision(accept)

    def acceptance_rate(self) -> float:
        counted = self.steps - self.burn_in
        return self.accepted / counted if counted > 0 else 1.0


class ScoredGate(Gate, ABC):
    """Accepts by a score of the window, at a rate its controller keeps. A subclass says what the score is."""

    selective = True
    kept = ("controller", "generator")

    def __init__(self, controller: ThresholdController, seed: int = 0):
        self.controller, self.target_rate, self.burn_in = controller, controller.target_rate, controller.burn_in
        self.generator = torch.Generator().manual_seed(seed)

    @classmethod
    def from_settings(cls, settings: GateSettings, model: torch.nn.Module, kind: str, seed: int) -> Self:
        rates = {"steepness": settings.gate_beta, "ema_rate": settings.gate_ema, "burn_in": settings.gate_burn_in}
        return cls(ThresholdController(settings.gate_rate, **rates), seed)

    @abstractmethod
    def score(self, measured: torch.Tensor) -> float:
        """The score as it is logged, higher for what is to be accepted unless `preference` says otherwise."""

    def preference(self, score: float, measured: torch.Tensor) -> float:
        """What is thresholded, or ranked: the score itself, unless a subclass turns or combines it."""
        return score

    def learn(self, measured: torch.Tensor) -> None:
        """What measures so was accepted."""

    def decide(self, measured: torch.Tensor) -> Decision:
        score = self.score(measured)
        preference = self.preference(score, measured)
        drawn = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        accept = drawn < self.controller.probability(preference)
        if accept:
            self.learn(measured)
        self.controller.observe(preference, accept)
        return Decision(accept, score)

    def acceptance_rate(self) -> float:
        return self.controller.acceptance_rate()


class LossFloor(ScoredGate):
    """Selective backprop (Jiang et al. 2019) for whole batches: those with the higher loss, above a floor that keeps
    the rate."""

    name = "loss_floor"

    def measure(self, candidate: Candidate) -> torch.Tensor:
        return candidate.loss.double().cpu().reshape(1)

    def score(self, measured: torch.Tensor) -> float:
        return measured[0].item()


class ExcessLoss(LossFloor):
    """RHO-LOSS (Mindermann et al. 2022) of examples: the loss less a reference model's, which is the frozen base here.

    What the base predicts as badly as the adapter does (noise, what cannot be learnt) scores low, and so does what is
    learnt already. Theirs is a model trained on held-out data; the base costs no training.
    """

    name, of_examples = "excess_loss", True


GATES.update({gate.name: gate for gate in (RandomGate, LossFloor, ExcessLoss)})
