"""Gates by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit.errors import require
from lorakit.gates.novelty import HeadGradientGate
from lorakit.gates.simple import LossFloor, RandomGate
from lorakit.gates.threshold import ThresholdController
from lorakit.gates.variants import GradientNorm, LeastNovel, NoveltyAndLoss
from lorakit.head import find_head
from lorakit.seams import AlwaysOpen, Gate

SKETCHING = {gate.name: gate for gate in (HeadGradientGate, LeastNovel, GradientNorm, NoveltyAndLoss)}
GATES = ("none", "random", "loss_floor", *SKETCHING)


@dataclass(frozen=True)
class GateSettings:
    """What a gate is told; see `HeadGradientGate` for what each means and may be.

    name: one of GATES; rate: the target acceptance rate; beta: steepness per spread of the score.
    """

    name: str = "none"
    rate: float = 0.3
    beta: float = 10.0
    burn_in: int = 20
    ema: float = 0.05
    m: int = 512
    k: int = 64
    rows: int = 0
    topk: int = 64
    refresh: int = 4
    decay: float = 1.0
    leverage: bool = False


def build_gate(settings: GateSettings, model: torch.nn.Module, kind: str, seed: int = 0) -> Gate:
    """The gate of that name for `model`, whose task is "classify", "masked" or "causal".

    Raises:
        ParameterError: a gate that does not exist, or a setting outside its range.
        LorakitError: a gate that looks at the head gradient, and a model without a linear head.
    """
    name = settings.name
    require(name in GATES, "gate", name, f"must be one of {', '.join(GATES)}")
    if name == "none":
        return AlwaysOpen()
    if name == "random":
        return RandomGate(settings.rate, burn_in=settings.burn_in, seed=seed)
    if name == "loss_floor":
        controller = ThresholdController(
            settings.rate, steepness=settings.beta, ema_rate=settings.ema, burn_in=settings.burn_in
        )
        return LossFloor(controller, seed)
    head = find_head(model, kind)
    return SKETCHING[name](
        head.d_hidden,
        head.outputs,
        m=settings.m,
        k=settings.k,
        target_novelty=settings.rate,
        target_novelty_scaler=settings.beta,
        novelty_ema_rate=settings.ema,
        burn_in=settings.burn_in,
        seed=seed,
        device=head.module.weight.device,
        reorth_every=settings.refresh,
        k_topk=settings.topk,
        kind=kind,
        softcap=head.softcap,
        rows=settings.rows,
        decay=settings.decay,
        leverage=settings.leverage,
    )
