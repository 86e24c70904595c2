"""Training FLOPs: every matrix product of (m, k) with (k, n) costs 2mkn, attention costs its matrix products.

Element-wise work, normalisation, softmax and look-ups count as 0, the convention of `torch.utils.flop_counter`, whose
formulas are used. Causal attention is counted in full, as there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import bmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop, shape_wrapper

aten = torch.ops.aten


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of what runs inside it, leaving kernels and numbers as they are.

    Works around a forward, a backward, or both; under autocast; with gradient checkpointing (the recomputation is
    counted where it runs, in the backward); on real, fake and meta tensors; on CPU and CUDA.

    >>> with FlopCount() as count:
    ...     loss = model(**batch).loss
    >>> count.total

    Attributes:
        total: FLOPs so far. Entering the mode again goes on adding.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; True imports the compiler (seconds) and slows every operator

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.einsum.default:  # seen whole only in inference mode; its own kernel is products of matrices
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if (flops := _formula(func)) is not None:
            self.total += flops(*args, **kwargs, out_val=out)
        return out


@functools.cache
def _formula(func: Any) -> Callable[..., int] | None:
    """The FLOPs of one operator as a function of its arguments, or None where it costs nothing."""
    packet = getattr(func, "_overloadpacket", func)
    return flop_registry.get(packet) or _EXTRA.get(packet) or _BY_NAME.get(getattr(packet, "_qualified_op_name", ""))


def _linear_flop(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """(…, k) with (n, k)."""
    return 2 * prod(x) * weight[0]


def _matmul_flop(a: torch.Size, b: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """(…, m, k) with (…, k, n), broadcast; vectors count as matrices with one row or column."""
    return 2 * prod(out_shape) * a[-1]


def _matvec_flop(matrix: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _addmv_flop(bias: torch.Size, matrix: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _addbmm_flop(bias: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return bmm_flop(a, b)


def _four_bit_flop(x: torch.Size, packed: torch.Size, dense_shape: Any, *_: Any, **__: Any) -> int:
    """bitsandbytes: (…, k) with 4-bit weights of dense shape (n, k), counted as the dense product."""
    return 2 * prod(x) * dense_shape[0]


# What torch's registry leaves out: CPU attention, products with vectors or into a given tensor, and the composite
# operators, which reach a dispatch mode whole under `torch.inference_mode` only.
_EXTRA: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    aten.scaled_dot_product_attention: sdpa_flop,
    aten.linear: shape_wrapper(_linear_flop),
    aten.matmul: shape_wrapper(_matmul_flop),
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten.mv: shape_wrapper(_matvec_flop),
    aten.dot: shape_wrapper(_matvec_flop),
    aten.addmv: shape_wrapper(_addmv_flop),
    aten.addbmm: shape_wrapper(_addbmm_flop),
}

# Operators of libraries that may not be imported yet.
_BY_NAME: dict[str, Callable[..., int]] = {
    "bitsandbytes::gemm_4bit": shape_wrapper(_four_bit_flop),
    "bitsandbytes::gemv_4bit": shape_wrapper(_four_bit_flop),
}
