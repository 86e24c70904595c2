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


class Onlooker(TorchDispatchMode):
    """A dispatch mode for operators of every kind that run as they are."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; True imports the compiler (seconds) and slows every operator


class FlopCount(Onlooker):
    """Counts the FLOPs of what runs inside it, leaving kernels and numbers as they are.

    Works around a forward, a backward, or both; under autocast; with gradient checkpointing (the recomputation is
    counted where it runs, in the backward); on real, fake and meta tensors; on CPU and CUDA.

    >>> with FlopCount() as count:
    ...     loss = model(**batch).loss
    >>> count.total

    Attributes:
        total: FLOPs so far. Entering the mode again goes on adding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

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
    formula = flop_registry.get(packet) or _EXTRA.get(getattr(packet, "_qualified_op_name", ""))
    looks_at_tensors = packet in flop_registry and not hasattr(formula, "__wrapped__")  # as few of torch's do
    if formula is None or looks_at_tensors:
        return formula
    of_shapes = getattr(formula, "__wrapped__", formula)

    # torch's own way from tensors to shapes, through its pytree, takes longer than many a product
    def flops(*args: Any, out_val: Any, **kwargs: Any) -> int:
        named = {name: _shape(value) for name, value in kwargs.items()}
        return of_shapes(*map(_shape, args), out_shape=_shape(out_val), **named)

    return flops


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape
    return tuple(map(_shape, value)) if isinstance(value, tuple) else value


# What torch's registry leaves out: CPU attention, products with vectors or into a given tensor, and the composite
# operators, which reach a dispatch mode whole under `torch.inference_mode` only; by name, as libraries may not be
# imported yet. Arguments are those of the operators.
_EXTRA: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": sdpa_flop,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": sdpa_backward_flop,
    "aten::scaled_dot_product_attention": sdpa_flop,
    "aten::linear": lambda x, weight, *_, **__: 2 * prod(x) * weight[0],  # (…, k) with (n, k)
    # (…, m, k) with (…, k, n), broadcast; vectors count as matrices with one row or column
    "aten::matmul": lambda a, b, *_, out_shape, **__: 2 * prod(out_shape) * a[-1],
    "aten::addmm_": flop_registry[aten.addmm],
    "aten::baddbmm_": flop_registry[aten.baddbmm],
    **dict.fromkeys(("aten::mv", "aten::dot"), lambda matrix, *_, **__: 2 * prod(matrix)),
    "aten::addmv": lambda bias, matrix, *_, **__: 2 * prod(matrix),
    "aten::addbmm": lambda bias, a, b, *_, **__: bmm_flop(a, b),
    # (…, k) with 4-bit weights, counted as the dense (n, k) would be
    "bitsandbytes::gemm_4bit": lambda x, packed, dense, *_, **__: 2 * prod(x) * dense[0],
    "bitsandbytes::gemv_4bit": lambda x, packed, dense, *_, **__: 2 * prod(x) * dense[0],
}
