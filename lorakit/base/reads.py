"""Which weights a model reads past their layer's own forward (Mamba's dt_proj): packed in 4 bits they would be garbage.

One forward on tensors without values tells, so it costs neither memory nor time.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lorakit.modules import evaluating

# what may be asked of a weight without a look at its numbers or their type
PROPERTIES = ("device", "shape", "requires_grad", "ndim", "is_meta", "grad")
HARMLESS = {getattr(torch.Tensor, name).__get__ for name in PROPERTIES}
HARMLESS |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel}


class _Reads(TorchFunctionMode):
    """Collects the layers whose weight a function is given while the layer itself is not running."""

    def __init__(self, weights: dict[int, nn.Module]):
        self.weights, self.running, self.found = weights, set(), set()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in HARMLESS:
            asked = (self.weights[id(part)] for part in tree_leaves((args, kwargs)) if id(part) in self.weights)
            self.found |= {layer for layer in asked if layer not in self.running}
        return function(*args, **kwargs or {})


def read_elsewhere(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those of the linear layers at `paths` whose weight something else reads, or asks for its dtype.

    Empty where the model has no inputs of its own to try (`dummy_inputs`), or cannot run on them without values.
    """
    if not (inputs := getattr(model, "dummy_inputs", None)):
        return []
    state = {}  # of each module once, also where it has several names: swapped twice it would not come back
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}.items()
        state |= {f"{path}.{name}".lstrip("."): value.to("meta") for name, value in own if value is not None}
    layers = {path: model.get_submodule(path) for path in paths}
    reads = _Reads({id(state[f"{path}.weight"]): layer for path, layer in layers.items() if f"{path}.weight" in state})
    with contextlib.suppress(Exception), contextlib.ExitStack() as hooks:  # whatever a model does with values
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_pre_hook(lambda layer, _: reads.running.add(layer)))
            hooks.enter_context(layer.register_forward_hook(lambda layer, *_: reads.running.discard(layer)))
        with evaluating(model), torch.no_grad(), torch.device("meta"), reads:
            given = {name: value.to("meta") for name, value in inputs.items()}
            torch.func.functional_call(model, state, (), given, tie_weights=False)
    return [path for path, layer in layers.items() if layer in reads.found]
