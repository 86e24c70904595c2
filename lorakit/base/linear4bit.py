"""y = x Wᵀ + b with W unpacked from 4 bits, for weights whose rows are not whole blocks; import it only where needed.

On CPUs with AVX512 bitsandbytes 0.50 unpacks such a weight with the scales of other blocks, without a word: it takes
every row to start a block. Unpacked as one long row it is right, which is what happens here; else all is the library's.
"""

from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.base.nf4 import dequantise


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' layer, with a product of its own on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), computed in `compute_dtype`, in the dtype of `x`."""
        if x.device.type != "cpu":
            return super().forward(x)
        dtype = self.compute_dtype or x.dtype
        return _Product.apply(x.to(dtype), None if self.bias is None else self.bias.to(dtype), self).to(x.dtype)


class _Product(torch.autograd.Function):
    """Unpacks W in the forward and again in the backward, so that it does not live in between; it gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return F.linear(x, dequantise(layer, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_bias, _ = ctx.needs_input_grad
        dX = dY @ dequantise(ctx.layer, dY.dtype) if for_x else None
        return dX, dY.flatten(0, -2).sum(0) if for_bias else None, None
