"""What merging back into 4 bits would cost: ‖Q(W) − W‖ / ‖W‖ of the merged weight W = dequantise(W0) + ΔW."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lorakit.adapters.attachment import adapter_layers, is_merged
from lorakit.adapters.layer import AdapterLayer
from lorakit.base.nf4 import bitsandbytes, is_four_bit, unpack
from lorakit.errors import LorakitError


def requantisation_error(model: nn.Module) -> dict[str, Any]:
    """What storing the merged weight in 4 bits again would cost: ‖Q(W) − W‖ / ‖W‖ with W = dequantise(W0) + ΔW.

    Returns:
        "layers": the error of each adapted 4-bit layer by path; "overall": over all their weights together.

    Raises:
        LorakitError: no adapter sits on a 4-bit layer, or the adapter is merged.
    """
    if is_merged(model):
        raise LorakitError("the adapter is merged into dense weights; unmerge(model) before asking")
    squares = {path: _squares(layer) for path, layer in adapter_layers(model).items() if is_four_bit(layer.base_layer)}
    if not squares:
        raise LorakitError(f"no adapter of this {type(model).__name__} is on a 4-bit layer; quantize_nf4, then attach")
    lost, whole = (sum(column) for column in zip(*squares.values(), strict=True))
    return {"layers": {path: math.sqrt(a / b) for path, (a, b) in squares.items()}, "overall": math.sqrt(lost / whole)}


@torch.no_grad()
def _squares(layer: AdapterLayer) -> tuple[float, float]:
    """‖Q(W) − W‖² and ‖W‖² of the merged weight, quantised as the base is."""
    state, merged = layer.base_layer.weight.quant_state, layer.merged_weight()
    packed, again = bitsandbytes().functional.quantize_4bit(
        merged.contiguous(), blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type
    )
    error = unpack(packed, again).double() - merged.double()
    return float(error.square().sum()), float(merged.double().square().sum())
