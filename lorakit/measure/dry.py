"""A dry run: the model's own code on tensors that have a shape and no data, in the state the Trainer puts it in."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.modules import set_until


@contextlib.contextmanager
def faked(model: nn.Module, mode: Any) -> Iterator[None]:
    """Replace parameters and buffers by fake tensors for a while; tied ones stay tied."""
    slots = [slot for module in model.modules() for slot in (module._parameters, module._buffers)]
    with _kept(slots):
        fakes = {id(tensor): fake(mode, tensor) for slot in slots for tensor in slot.values()}
        for slot in slots:
            slot.update({name: fakes[id(tensor)] for name, tensor in slot.items()})
        yield


def _kept(attributes: list[dict[Any, Any]]) -> contextlib.ExitStack:
    """What is in each of the dicts now is in it afterwards, and nothing else."""
    stack = contextlib.ExitStack()
    for own in attributes:
        stack.callback(own.update, dict(own))
        stack.callback(own.clear)  # called first
    return stack


def fake(mode: Any, value: Any) -> Any:
    """A tensor like `value`, on the CPU, without data; a parameter stays one, a 4-bit one with its real scales."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    made = nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made
    if hasattr(value, "quant_state"):
        made.quant_state = value.quant_state
    return made


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
    # checkpointing adds hooks; classifiers note their problem_type in the configuration
    changed = [kept for module in model.modules() for kept in (vars(module), module._forward_hooks)]
    caches = hasattr(config, "use_cache")
    with _kept([*changed, vars(config)] if caches else changed):
        if caches:
            config.use_cache = False
        model.train()
        if checkpointing:
            # the random state of dropout has no bytes here, and fake tensors cannot set it
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        yield


@contextlib.contextmanager
def cuda_attention() -> Iterator[None]:
    """Attention with dropout as CUDA has it, drawn inside the flash kernel; the CPU's would keep (B, heads, T, T)."""
    kernel = F.scaled_dot_product_attention
    with contextlib.ExitStack() as stack:
        # a function mode would be simpler, but is suspended while checkpointing recomputes in the backward
        set_until(stack, F, scaled_dot_product_attention=lambda *args, **own: kernel(*args, **own | {"dropout_p": 0.0}))
        yield
