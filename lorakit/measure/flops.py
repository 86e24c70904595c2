"""Training FLOPs: every matrix product of (m, k) with (k, n) costs 2mkn, attention costs its matrix products.

Element-wise work, normalisation, softmax and look-ups count as 0, the convention of `torch.utils.flop_counter`, whose
formulas are used. Causal attention is counted in full, as there.
"""

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import bmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop

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
    formula = flop_registry.get(packet)
    if formula is not None and not hasattr(formula, "__wrapped__"):  # one of the few that look at the tensors
        return formula
    formula = formula or _EXTRA.get(packet) or _BY_NAME.get(getattr(packet, "_qualified_op_name", ""))
    return formula and _of_shapes(getattr(formula, "__wrapped__", formula))


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of shapes as one of an operator's arguments, tensors among them, and of its result `out_val`.

    Torch's own way through its pytree takes longer than many a product.
    """

    def flops(*args: Any, out_val: Any, **kwargs: Any) -> int:
        named = {name: _shape(value) for name, value in kwargs.items()}
        return formula(*map(_shape, args), out_shape=_shape(out_val), **named)

    return flops


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape
    return tuple(map(_shape, value)) if isinstance(value, tuple) else value


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
    aten.linear: _linear_flop,
    aten.matmul: _matmul_flop,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten.mv: _matvec_flop,
    aten.dot: _matvec_flop,
    aten.addmv: _addmv_flop,
    aten.addbmm: _addbmm_flop,
}

# Operators of libraries that may not be imported yet.
_BY_NAME: dict[str, Callable[..., int]] = {
    "bitsandbytes::gemm_4bit": _four_bit_flop,
    "bitsandbytes::gemv_4bit": _four_bit_flop,
}
