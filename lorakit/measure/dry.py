"""A dry run: the model's own code on tensors that have a shape and no data, in the state the Trainer puts it in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def faked(model: nn.Module, mode: Any) -> Iterator[None]:
    """Replace parameters and buffers by fake tensors for a while; tied ones stay tied."""
    fakes: dict[int, torch.Tensor] = {}  # by identity
    originals = []
    for module in model.modules():
        for slot in (module._parameters, module._buffers):
            originals += [(slot, name, tensor) for name, tensor in slot.items() if tensor is not None]
    try:
        for slot, name, tensor in originals:
            if id(tensor) not in fakes:
                fakes[id(tensor)] = fake(mode, tensor)
            slot[name] = fakes[id(tensor)]
        yield
    finally:
        for slot, name, tensor in originals:
            slot[name] = tensor


def fake(mode: Any, value: Any) -> Any:
    """A tensor like `value`, on the CPU, without data; a parameter stays one."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty


def fake_mode() -> Any:
    """A mode in which every operator makes tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # tensors that are neither parameters nor buffers stay real and are faked where they are used
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def training_state(model: nn.Module, gradient_checkpointing: bool) -> Iterator[None]:
    """The state the Trainer puts a model in, undone afterwards: training, no key-value cache, checkpointing."""
    checkpointing = gradient_checkpointing or getattr(model, "is_activation_checkpointing", False)
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            for name in ("training", "gradient_checkpointing", "_gradient_checkpointing_func"):
                undo.callback(_put_back, vars(module), name, vars(module).get(name, _ABSENT))
        if hasattr(getattr(model, "config", None), "use_cache"):
            undo.callback(setattr, model.config, "use_cache", model.config.use_cache)
            model.config.use_cache = False
        model.train()
        if checkpointing:
            # the random state of dropout has no bytes here, and fake tensors cannot set it
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        yield


_ABSENT = object()


def _put_back(attributes: dict[str, Any], name: str, value: object) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


class CudaAttention(TorchFunctionMode):
    """Attention with dropout as CUDA has it, drawn inside the flash kernel; the CPU's would keep (B, heads, T, T)."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            kwargs = kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)
