"""What SLoRA's gate is compared with: the same sketch, another score. Each keeps the same acceptance rate."""

from typing import Any

import torch

from lorakit.gates.novelty import HeadGradientGate
from lorakit.gates.threshold import RunningScale
from lorakit.seams import GATES, Candidate


class LeastNovel(HeadGradientGate):
    """The control: accepts the *least* novel batches. Were novelty worth anything, this would be the worst gate."""

    name = "least_novel"

    def preference(self, score: float, measured: torch.Tensor) -> float:
        return -score


class GradientNorm(HeadGradientGate):
    """Accepts batches with a large head gradient: ‖z‖ per label, whose square is unbiased for ‖Σ h ⊗ e‖²."""

    name, scores_novelty = "gradient_norm", False

    def measure(self, candidate: Candidate) -> torch.Tensor:
        return torch.cat([super().measure(candidate), torch.tensor([float(candidate.targets)], dtype=torch.float64)])

    def score(self, measured: torch.Tensor) -> float:
        return torch.linalg.vector_norm(measured[: self.m]).item() / max(1.0, measured[self.m].item())

    def learn(self, measured: torch.Tensor) -> None:
        """The norm needs no basis."""


class NoveltyAndLoss(HeadGradientGate):
    """Accepts batches that are novel *and* have a high loss: the lower of both scores, standardised, is thresholded."""

    name = "novelty_loss"
    kept = (*HeadGradientGate.kept, "scales")

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.scales = {name: RunningScale(self.controller.ema_rate) for name in ("novelty", "loss")}

    def measure(self, candidate: Candidate) -> torch.Tensor:
        return torch.cat([super().measure(candidate), candidate.loss.double().cpu().reshape(1)])

    def preference(self, score: float, measured: torch.Tensor) -> float:
        values = {"novelty": score, "loss": measured[self.m].item()}
        lower = min(self.scales[name].standardised(value) for name, value in values.items())
        for name, value in values.items():
            self.scales[name].add(value)
        return lower


GATES.update({gate.name: gate for gate in (LeastNovel, GradientNorm, NoveltyAndLoss)})
