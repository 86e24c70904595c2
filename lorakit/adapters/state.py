"""What was trained, as tensors: taken out, put back (task switching), counted, and merged back into 4 bits."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attachment import adapter_layers, attachment_of, check_state, require_unmerged
from lorakit.base.nf4 import bitsandbytes, dense_numel, is_four_bit, unpack
from lorakit.errors import LorakitError
from lorakit.modules import unwrapping
from lorakit.records import Parameters


@unwrapping
def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything trained, task head included; it holds weights, not settings.

    Raises:
        LorakitError: nothing is attached.
        CheckpointError: the adapter is merged.
    """
    require_unmerged(model)
    return {name: tensor.detach().clone() for name, tensor in attachment_of(model).tensors(model).items()}


@unwrapping
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Put `state` in place of what is trained now: all of it or, on an error, nothing.

    Raises:
        CheckpointError: the adapter is merged, tensors are missing or unexpected, or a shape differs.
    """
    require_unmerged(model)
    here = attachment_of(model).tensors(model)
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


@torch.no_grad()
@unwrapping
def requantisation_error(model: nn.Module) -> dict[str, Any]:
    """What storing the merged weight in 4 bits again would cost: ‖Q(W) − W‖ / ‖W‖ with W = dequantise(W0) + ΔW.

    Returns:
        "layers": the error of each adapted 4-bit layer by path; "overall": over all their weights together.

    Raises:
        LorakitError: no adapter sits on a 4-bit layer, or the adapter is merged.
    """
    require_unmerged(model)
    squares = {}  # ‖Q(W) − W‖² and ‖W‖²
    for path, layer in adapter_layers(model).items():
        if is_four_bit(layer.base_layer):
            state, merged = layer.base_layer.weight.quant_state, layer.merged_weight()
            how = {"blocksize": state.blocksize, "compress_statistics": state.nested, "quant_type": state.quant_type}
            packed, again = bitsandbytes().functional.quantize_4bit(merged, **how)
            exact = merged.double()
            squares[path] = (unpack(packed, again) - exact).square().sum(), exact.square().sum()
    if not squares:
        raise LorakitError(f"no adapter of this {type(model).__name__} is on a 4-bit layer; quantize_nf4, then attach")
    lost, whole = (sum(column) for column in zip(*squares.values(), strict=True))
    return {"layers": {path: math.sqrt(a / b) for path, (a, b) in squares.items()}, "overall": math.sqrt(lost / whole)}
