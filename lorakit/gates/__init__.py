"""Which batches get a backward pass."""

import torch

from lorakit.errors import require
from lorakit.gates.examples import BestRows
from lorakit.gates.log import GateWarning
from lorakit.gates.novelty import HeadGradientGate
from lorakit.gates.simple import ExcessLoss, LossFloor, RandomGate
from lorakit.gates.threshold import ThresholdController
from lorakit.gates.variants import GradientNorm, LeastNovel, NoveltyAndLoss
from lorakit.seams import GATES, Gate
from lorakit.settings import GateSettings


def candidates(settings: GateSettings) -> int:
    """Rows looked at for each that is trained on; 1 where whole batches are chosen, or nothing is."""
    return settings.gate_candidates if settings.gate != "none" and settings.gate_level == "example" else 1


def build_gate(settings: GateSettings, model: torch.nn.Module, kind: str, seed: int = 0) -> Gate:
    """The gate of that name for `model`, whose task is "classify", "masked" or "causal".

    Raises:
        ParameterError: a gate that does not exist, or does not choose what `gate_level` says, or not in such a model.
        LorakitError: a gate that looks at the head gradient, and a model without a linear head.
    """
    require(settings.gate in GATES, "gate", settings.gate, f"must be one of {', '.join(GATES)}")
    if (ratio := candidates(settings)) == 1:
        gate = GATES[settings.gate].from_settings(settings, model, kind, seed)
        require(not gate.of_examples, "gate_level", "batch", f"gate {settings.gate!r} chooses examples: 'example'")
        return gate
    asked = GateSettings.of(settings).but(gate_rate=1 / ratio, gate_burn_in=0)
    gate = BestRows(GATES[settings.gate].from_settings(asked, model, kind, seed), ratio)
    require(settings.gate != "novelty_loss", "gate", settings.gate, "its averages move from row to row: 'batch'")
    told = f"gate {settings.gate!r} scores a classifier's examples; a language model's: random, loss_floor, excess_loss"
    require(kind == "classify" or not gate.needs_hidden, "gate_level", "example", told)
    return gate
