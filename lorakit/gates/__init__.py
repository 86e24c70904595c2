"""Which batches get a backward pass."""

import torch

from lorakit.errors import require
from lorakit.gates.log import GateWarning
from lorakit.gates.novelty import HeadGradientGate
from lorakit.gates.simple import LossFloor, RandomGate
from lorakit.gates.threshold import ThresholdController
from lorakit.gates.variants import GradientNorm, LeastNovel, NoveltyAndLoss
from lorakit.seams import GATES, Gate
from lorakit.settings import GateSettings


def build_gate(settings: GateSettings, model: torch.nn.Module, kind: str, seed: int = 0) -> Gate:
    """The gate of that name for `model`, whose task is "classify", "masked" or "causal".

    Raises:
        ParameterError: a gate that does not exist.
        LorakitError: a gate that looks at the head gradient, and a model without a linear head.
    """
    require(settings.gate in GATES, "gate", settings.gate, f"must be one of {', '.join(GATES)}")
    return GATES[settings.gate].from_settings(settings, model, kind, seed)
