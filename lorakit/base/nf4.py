"""NF4: w ≈ a_b · q_i, one of 16 normal quantiles q_i per weight, one scale a_b = max|w| per block b of 64 weights.

QLoRA's storage (Dettmers et al. 2023), as bitsandbytes keeps it: two codes to a byte, and with double quantisation
the scales themselves in 8 bits, a_b ≈ m + s_c · d_j, with one fp32 scale s_c per 256 of them.
"""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ParameterError

BLOCK = 64  # weights to a scale


def bitsandbytes() -> ModuleType:
    """The library, imported where it is first used.

    Raises:
        ParameterError: it cannot be imported.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError) as error:
        raise ParameterError("quantize", "nf4", f"needs bitsandbytes, which cannot be imported: {error}") from None
    return bitsandbytes


def is_four_bit(module: nn.Module) -> bool:
    """Whether `module` is bitsandbytes' 4-bit linear layer."""
    # a model that has one has imported it
    return isinstance(module, getattr(sys.modules.get("bitsandbytes.nn"), "Linear4bit", ()))


def dequantise(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """W of a 4-bit layer, a new tensor, (out_features, in_features) in `dtype`, or in that of before it was packed."""
    return unpack(layer.weight.data, layer.weight.quant_state, dtype)


def unpack(packed: Tensor, state: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The weights that bitsandbytes' `quantize_4bit` packed, in their shape.

    As one row: the library's CPU kernel misreads the scales where several rows are not whole blocks. And of even
    length: for odd ones it would compile a kernel.
    """
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes().functional.dequantize_blockwise(scales, state.state2) + state.offset
    count = state.shape.numel()
    how = state.blocksize, state.quant_type, (1, count + count % 2), dtype or state.dtype
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, *how).view(-1)[:count].view(state.shape)


def dense(layer: nn.Module, weight: Tensor | None = None) -> nn.Linear:
    """The plain linear layer of a 4-bit one, frozen, with its unpacked weight or `weight`."""
    weight = dequantise(layer) if weight is None else weight
    # on meta: no values are drawn
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(weight.dtype), requires_grad=False)
    return linear.train(layer.training)


def dense_numel(parameter: Tensor) -> int:
    """Number of weights `parameter` stands for; a packed one has fewer elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def scale_tensors(parameter: Tensor) -> list[Tensor]:
    """What is stored beside a packed weight: scales and codebook, and with double quantisation those of the scales."""
    if (state := getattr(parameter, "quant_state", None)) is None:
        return []
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def stored_bytes(parameter: Tensor) -> int:
    """Bytes of `parameter` with everything needed to read it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (parameter, *scale_tensors(parameter)))
