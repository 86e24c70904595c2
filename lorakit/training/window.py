"""An optimizer step's window: its micro-batches between forward and decision, and its gradients over all processes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.seams import Candidate

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Part:
    """A micro-batch between its forward and the decision about its window.

    cost: key and sizes of its backward, see `FlopMeter.measure`.
    tokens: how many a backward passes through; targets: labels it has.
    candidate: what the gate will look at; or measured, gate_flops: what it found while the tokens were chosen.
    loss: mean over all labels where the one to backpropagate is of chosen tokens only, else None.
    finish: runs what is left of the forward and gives the loss to backpropagate; None: nothing is left.
    """

    cost: tuple[Hashable, tuple[int, ...]]
    tokens: int
    targets: int
    candidate: Candidate | None = None
    measured: Tensor | None = None
    gate_flops: float = 0.0
    loss: float | None = None
    finish: Callable[[], Tensor] | None = None
    backpropagated: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Mean over ranks, in one reduction: what DistributedDataParallel does, which was told not to.

    A rank whose batches had nothing to learn from has no gradients; it takes part with zeros.
    """
    if accelerator.num_processes == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in trained], device=accelerator.device).float()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = accelerator.reduce(torch.cat([present, *(g.flatten().float() for g in parts)]), "mean")
    present, *means = flat.split([len(trained), *(p.numel() for p in trained)])
    for parameter, part, mean, anywhere in zip(trained, parts, means, present.tolist(), strict=True):
        if anywhere:
            part.copy_(mean.view_as(part))
            parameter.grad = part
