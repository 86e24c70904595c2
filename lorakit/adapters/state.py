"""What was trained, as tensors: taken out, put back (task switching), counted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakit.adapters.attachment import attachment_of, check_state, require_unmerged, trained_tensors
from lorakit.base.nf4 import dense_numel
from lorakit.records import Parameters


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything trained, task head included; it holds weights, not settings.

    Raises:
        LorakitError: nothing is attached.
        CheckpointError: the adapter is merged.
    """
    require_unmerged(model)
    return {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Put `state` in place of what is trained now: all of it or, on an error, nothing.

    Raises:
        CheckpointError: the adapter is merged, tensors are missing or unexpected, or a shape differs.
    """
    require_unmerged(model)
    here = trained_tensors(model)
    check_state(here, state)
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(state[name])
    return model


def parameter_stats(model: nn.Module) -> Parameters:
    """Trainable, total (base and adapters) and non-zero trainable parameters; a tied parameter counts once.

    A weight in 4 bits counts as the out_features · in_features values it stands for, not as the bytes they are in.
    """
    total = sum(dense_numel(parameter) for parameter in model.parameters())
    if hasattr(model, "lorakit_attachment"):
        total -= model.lorakit_attachment.idle_numel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    # a meta tensor has no values to look at
    nonzero = sum(p.numel() if p.is_meta else int(torch.count_nonzero(p)) for p in trained)
    return Parameters(trainable=trainable, total=total, nonzero=nonzero, reduction_factor=total / max(trainable, 1))


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the tensors `save_adapter` stores (the file's header, a few kilobytes, not counted)."""
    stored = attachment_of(model).stored(model).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in stored)
