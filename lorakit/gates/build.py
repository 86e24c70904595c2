"""Gates by name."""

from __future__ import annotations

import torch

from lorakit.errors import require
from lorakit.gates.novelty import HeadGradientGate
from lorakit.gates.simple import LossFloor, RandomGate
from lorakit.gates.threshold import ThresholdController
from lorakit.gates.variants import GradientNorm, LeastNovel, NoveltyAndLoss
from lorakit.head import find_head
from lorakit.seams import AlwaysOpen, Gate
from lorakit.settings import GateSettings

SKETCHING = {gate.name: gate for gate in (HeadGradientGate, LeastNovel, GradientNorm, NoveltyAndLoss)}
GATES = ("none", "random", "loss_floor", *SKETCHING)


def build_gate(settings: GateSettings, model: torch.nn.Module, kind: str, seed: int = 0) -> Gate:
    """The gate of that name for `model`, whose task is "classify", "masked" or "causal".

    Raises:
        ParameterError: a gate that does not exist.
        LorakitError: a gate that looks at the head gradient, and a model without a linear head.
    """
    name = settings.gate
    require(name in GATES, "gate", name, f"must be one of {', '.join(GATES)}")
    if name == "none":
        return AlwaysOpen()
    if name == "random":
        return RandomGate(settings.gate_rate, burn_in=settings.gate_burn_in, seed=seed)
    if name == "loss_floor":
        controller = ThresholdController(
            settings.gate_rate, steepness=settings.gate_beta, ema_rate=settings.gate_ema, burn_in=settings.gate_burn_in
        )
        return LossFloor(controller, seed)
    head = find_head(model, kind)
    return SKETCHING[name](
        head.d_hidden,
        head.outputs,
        m=settings.gate_m,
        k=settings.gate_k,
        target_novelty=settings.gate_rate,
        target_novelty_scaler=settings.gate_beta,
        novelty_ema_rate=settings.gate_ema,
        burn_in=settings.gate_burn_in,
        seed=seed,
        device=head.module.weight.device,
        reorth_every=settings.gate_refresh,
        k_topk=settings.gate_topk,
        kind=kind,
        softcap=head.softcap,
        rows=settings.gate_rows,
        decay=settings.gate_decay,
        leverage=settings.gate_leverage,
    )
