"""What is attached to a model: one interface, whoever's code it is, to take off, merge and read it."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lorakit.adapters.layer import ADAPTERS, AdapterLayer
from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.fields import Settings
from lorakit.modules import inside, once, replace_modules, unwrapping
from lorakit.seams import Controller
from lorakit.settings import AdapterSettings

TRAINED = WeakIdKeyDictionary()  # a parameter that is trained in full -> the model that it was attached in, weakly


@dataclass(frozen=True)
class Attachment:
    """What `attach` did to a model, names only; kept on the model as `lorakit_attachment`.

    This is lorakit's own kind, adapter layers in the model's place; PEFT's wrapper is another (`peft.method`).
    """

    method: str
    settings: AdapterSettings
    targets: Mapping[str, AdapterSettings]  # path of each adapted linear layer -> its own settings
    trained: Sequence[str]  # paths of the modules trained in full; "" is the whole model
    required_grad: Mapping[str, bool] = field(repr=False)  # of every parameter, before
    batches: Mapping[str, int] = field(repr=False)  # see `batches_seen`, before
    foreign: ClassVar[bool] = False  # whether the adapter's code and files are PEFT's own

    def controllers(self, model: nn.Module, run: Settings) -> list[Controller]:
        """What the method needs between the steps of a run with these parameters."""
        return ADAPTERS[self.method].controllers(model, run) if self.method in ADAPTERS else []

    def merge(self, model: nn.Module, safe: bool) -> None:
        for path, layer in adapter_layers(model).items():
            try:
                layer.merge(safe)
            except Exception as error:  # all layers or none, whatever a base layer raises
                self.unmerge(model)
                raise LorakitError(f"{path} cannot be merged: {error}") from error

    @contextmanager
    def bare(self, model: nn.Module) -> Iterator[nn.Module]:
        """While inside, the model with its base layers in the adapters' places, merged or not."""
        layers = adapter_layers(model).values()
        replace_modules(model, {layer: layer.base_layer for layer in layers})
        try:
            yield model
        finally:
            replace_modules(model, {layer.base_layer: layer for layer in layers})

    def unmerge(self, model: nn.Module) -> None:
        for layer in adapter_layers(model).values():
            layer.unmerge()

    def is_merged(self, model: nn.Module) -> bool:
        return any(layer.is_merged for layer in adapter_layers(model).values())

    def merge_obstacle(self, model: nn.Module) -> str:
        """Why there is nothing to merge, or why it cannot be; empty where it can."""
        layers = adapter_layers(model)
        found = (f"{path}: {problem}" for path, layer in layers.items() if (problem := layer.merge_obstacle()))
        return next(found, "") if layers else "no adapter"

    def detach(self, model: nn.Module) -> nn.Module:
        """The model as it was, but for the modules trained in full; what is merged is unmerged before."""
        replace_modules(model, {layer: layer.base_layer for layer in adapter_layers(model).values()})
        del model.lorakit_attachment
        for ours in ("save_pretrained", "_hf_peft_config_loaded"):
            vars(model).pop(ours, None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.required_grad.get(name, parameter.requires_grad))
            TRAINED.pop(parameter, None)
        return model

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The live tensors that were trained: `<path>.lora_A.weight`, …, then those of modules trained in full.

        A tensor with two names (tied) is listed once.
        """
        found: dict[str, Tensor] = {}
        for path, layer in adapter_layers(model).items():
            found |= {f"{path}.{name}.weight": factor for name, factor in layer.adapter_parameters().items()}
        for path in self.trained:
            found |= model.get_submodule(path).state_dict(prefix=f"{path}." if path else "", keep_vars=True)
        return once(found)

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors that an adapter file holds: PEFT's format has a tied one under each of its names."""
        found = self.tensors(model)
        if self.method not in ADAPTERS:
            return found
        return found | {name: found[first] for name, first in tied_names(model).items() if first in found}

    def moved(self, model: nn.Module) -> list[str]:
        """Layers that are not trained and whose running statistics are not what they were before."""
        now = batches_seen(model.get_base_model() if self.foreign else model, self.trained)
        return [path for path, count in self.batches.items() if now.get(path, count) != count]

    def idle_numel(self, model: nn.Module) -> int:
        """Parameters that lie in the model without taking part."""
        return 0

    def write(self, model: nn.Module, folder: Path) -> None:
        """Of a foreign kind: write its own files into `folder`."""

    def read(self, model: nn.Module, folder: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Of a foreign kind: take in what `write` wrote."""


def batches_seen(model: nn.Module, trained: Sequence[str]) -> dict[str, int]:
    """How many batches went into the running statistics of layers that are not trained (BatchNorm's), by path."""
    named = [(name, count) for name, count in model.named_buffers() if name.endswith("num_batches_tracked")]
    return {name.rpartition(".")[0]: int(n) for name, n in named if not (n.is_meta or inside(name, trained))}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Of parameters with several names: each further name -> the first."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


def attachment_of(model: nn.Module) -> Attachment:
    """What was attached to `model`.

    Raises:
        LorakitError: nothing was.
    """
    if (attachment := getattr(model, "lorakit_attachment", None)) is None:
        raise LorakitError(f"this {type(model).__name__} has no adapter; call attach(model) first")
    return attachment


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def require_bare(model: nn.Module, method: str) -> None:
    """Raise `ParameterError` where an adapter, ours or PEFT's, is on `model`, in it, or around it."""
    if (present := getattr(model, "lorakit_attachment", None)) is not None:
        raise ParameterError("method", method, f"the model already has {present.method!r}; detach(model) first")
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # a model that has one has imported it
    foreign = () if tuners is None else (tuners.BaseTunerLayer, tuners.BaseTuner, sys.modules["peft"].PeftModel)
    for path, module in model.named_modules():
        theirs = isinstance(module, foreign)
        if theirs or isinstance(module, AdapterLayer) or hasattr(module, "lorakit_attachment"):
            whose, off = ("PEFT's", "unload()") if theirs else ("an", "detach(…)")
            raise ParameterError("method", method, f"{path or 'the model'} already has {whose} adapter; {off} it first")
    for name, parameter in model.named_parameters():
        around = TRAINED.get(parameter, lambda: None)()
        if around is not None and any(parameter is own for own in around.parameters()):
            told = f"{name} is trained in full, as part of a {type(around).__name__} that already has an adapter"
            raise ParameterError("method", method, f"{told}; detach(…) it first")


def is_merged(model: nn.Module) -> bool:
    attachment = getattr(model, "lorakit_attachment", None)
    return attachment is not None and attachment.is_merged(model)


def is_disabled(model: nn.Module) -> bool:
    """Whether the adapters are switched off, by `disabled` or by PEFT."""
    own = any(layer.is_off for layer in adapter_layers(model).values())
    return own or not getattr(model, "has_active_enabled_adapter", True)


def require_enabled(model: nn.Module) -> nn.Module:
    """Raise `LorakitError` inside `disabled`, whose end would not find what it left."""
    if is_disabled(model):
        raise LorakitError("the adapters are switched off: leave `with disabled(model):` first")
    return model


def require_unmerged(model: nn.Module) -> None:
    if is_merged(model):
        raise CheckpointError("the adapter is merged into the base weights; unmerge(model) first")


@unwrapping
def detach(model: nn.Module) -> nn.Module:
    """Take the adapter off: the original modules and `requires_grad` flags are back, merged weights are unmerged.

    Modules trained in full keep their trained values.
    """
    return attachment_of(unmerge(require_enabled(model))).detach(model)


@unwrapping
def merge(model: nn.Module, safe: bool = False) -> nn.Module:
    """Fold every adapter into its base weight, for inference without the adapter's cost.

    Costs a second copy of the adapted weights while merged, which is what makes `unmerge` exact. Merging twice is
    merging once; "head" and "full" have nothing to merge. `detach` takes the merging back; `export` keeps it.

    Args:
        safe: refuse to merge what is not finite.

    Raises:
        LorakitError: a type of PEFT or a base that cannot be merged (see `can_merge`), or `safe`; nothing is merged.
    """
    attachment_of(model).merge(require_enabled(model), safe)
    return model


@unwrapping
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: the base weights are back bit for bit."""
    attachment_of(model).unmerge(model)
    return model


@contextmanager
def merged(model: nn.Module, safe: bool = False) -> Iterator[nn.Module]:
    """`with merged(model):` runs merged and leaves the model as it found it."""
    before = is_merged(model)
    try:
        yield merge(model, safe)
    finally:
        if not before:
            unmerge(model)


def can_merge(model: nn.Module) -> bool:
    """Whether `merge` has something to fold into the weights and can; a prompt, say, is no weight."""
    return not attachment_of(model).merge_obstacle(model)


def check_state(here: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` naming the tensors of `state` that do not fit `here`."""
    for problem, names in (("missing", here.keys() - state.keys()), ("unexpected", state.keys() - here.keys())):
        if names:
            listed = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
            raise CheckpointError(f"the adapter does not fit this model: {len(names)} {problem} tensors: {listed}")
    for name, tensor in here.items():
        given = state[name]
        if tensor.shape != given.shape:
            shapes = f"{name} is {tuple(given.shape)}, this model has {tuple(tensor.shape)}"
            raise CheckpointError(f"the adapter is for another base: {shapes}")
        if (tensor.is_floating_point(), tensor.is_complex()) != (given.is_floating_point(), given.is_complex()):
            raise CheckpointError(f"{name} is {given.dtype}, this model has {tensor.dtype}")
        if not _finite(given) and _finite(tensor):  # a mask among the buffers may hold −∞
            raise CheckpointError(f"{name} holds NaN or infinite values")


def _finite(tensor: Tensor) -> bool | Tensor:
    return tensor.is_meta or torch.isfinite(tensor.float() if tensor.is_floating_point() else tensor).all()
