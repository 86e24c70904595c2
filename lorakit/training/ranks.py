"""Gradients over several processes, once per accepted window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


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
