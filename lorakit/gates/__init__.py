"""Which batches, and which tokens of them, get a backward pass."""

from lorakit.gates.batches import AlwaysOpen, Candidate, Decision, Gate
from lorakit.gates.build import GATES, GateSettings, build_gate
from lorakit.gates.controller import ThresholdController
from lorakit.gates.log import GateWarning
from lorakit.gates.novelty import HeadGradientGate
from lorakit.gates.simple import LossFloor, RandomGate
from lorakit.gates.tokens import AllTokens, Gating, TokenSelection, build_tokens
from lorakit.gates.variants import GradientNorm, LeastNovel, NoveltyAndLoss

__all__ = [
    "GATES",
    "AllTokens",
    "AlwaysOpen",
    "Candidate",
    "Decision",
    "Gate",
    "GateSettings",
    "GateWarning",
    "Gating",
    "GradientNorm",
    "HeadGradientGate",
    "LeastNovel",
    "LossFloor",
    "NoveltyAndLoss",
    "RandomGate",
    "ThresholdController",
    "TokenSelection",
    "build_gate",
    "build_tokens",
]
