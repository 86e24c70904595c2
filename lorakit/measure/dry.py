"""A dry run: the model's own code on tensors that have a shape and no data, in the state the Trainer puts it in."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


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
                if hasattr(tensor, "quant_state"):  # a 4-bit weight brings its scales, which stay real
                    fakes[id(tensor)].quant_state = tensor.quant_state
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
    config = getattr(model, "config", None)
    changed: list[dict[Any, Any]] = []
    for module in model.modules():
        changed += [vars(module), module._forward_hooks]  # checkpointing adds a hook
    if hasattr(config, "use_cache"):
        changed.append(vars(config))  # classifiers note their problem_type there
    before = [dict(attributes) for attributes in changed]
    try:
        if hasattr(config, "use_cache"):
            config.use_cache = False
        model.train()
        if checkpointing:
            # the random state of dropout has no bytes here, and fake tensors cannot set it
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        yield
    finally:
        for attributes, own in zip(changed, before, strict=True):
            attributes.clear()
            attributes.update(own)


@contextlib.contextmanager
def cuda_attention() -> Iterator[None]:
    """Attention with dropout as CUDA has it, drawn inside the flash kernel; the CPU's would keep (B, heads, T, T)."""
    kernel = F.scaled_dot_product_attention
    # a function mode would be simpler, but is suspended while checkpointing recomputes in the backward
    F.scaled_dot_product_attention = lambda *args, **kwargs: kernel(*args, **kwargs | {"dropout_p": 0.0})
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kernel
