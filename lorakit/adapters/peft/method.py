"""Any PEFT method: y = PEFT's model (x), wrapped around ours, and taken off again bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attachment import Attachment, batches_seen, detach
from lorakit.adapters.peft import files
from lorakit.adapters.peft.config import NOISE, require_frozen_base
from lorakit.adapters.peft.forward import ADAPTER, after_forward, before_forward, config_of
from lorakit.adapters.peft.schedule import PeftSchedule
from lorakit.adapters.peft.types import KNOWN
from lorakit.adapters.peft_format import require_quick
from lorakit.base.mending import prepare_four_bit
from lorakit.base.nf4 import is_four_bit
from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.fields import Settings
from lorakit.modules import name_matches, replace_modules
from lorakit.quiet import quiet
from lorakit.seams import Controller
from lorakit.settings import AdapterSettings

CANNOT_MERGE = {kind: one["why"] for one in KNOWN["cannot_merge"] for kind in one["types"]}


@dataclass(frozen=True)
class PeftAttachment(Attachment):
    """PEFT's wrapper around a model. Merging is into copies: the base's own tensors wait in `unmerged`."""

    children: Mapping[nn.Module, Mapping[str, nn.Module]] = field(repr=False)  # of every module before, no copies
    unmerged: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list, repr=False)
    foreign = True
    # called with the model first, as the methods they stand for
    stored = staticmethod(files.stored_tensors)
    write = staticmethod(files.save_peft)
    read = staticmethod(files.load_peft)

    def controllers(self, model: nn.Module, run: Settings) -> list[Controller]:
        return [PeftSchedule(model)]

    def merge_obstacle(self, model: nn.Module) -> str:
        kind = config_of(model).peft_type.value
        if kind == "BEFT" and any(layer.bias is None for layer in _base_layers(model)):
            return "a layer without a bias has no place for it"
        if any(map(is_four_bit, _base_layers(model))):
            return "PEFT would round the sum to 4 bits again"
        return CANNOT_MERGE.get(kind, "")

    def is_merged(self, model: nn.Module) -> bool:
        return bool(self.unmerged)

    def merge(self, model: nn.Module, safe: bool = False) -> None:
        if self.unmerged:
            return
        if obstacle := self.merge_obstacle(model):
            raise LorakitError(f"{config_of(model).peft_type.value} cannot be merged: {obstacle}")
        for layer in _base_layers(model):
            for name, parameter in layer.named_parameters(recurse=False):
                self.unmerged.append((layer, name, parameter))
                layer._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
        try:
            with quiet(*NOISE):
                model.base_model.merge_adapter()
            if safe and not all(torch.isfinite(layer.weight).all() for layer in _base_layers(model)):
                raise LorakitError("NaN or infinite values would be merged into the weights")
        except Exception:
            self.unmerge(model)
            raise

    @contextmanager
    def bare(self, model: nn.Module) -> Iterator[nn.Module]:
        inner = model.get_base_model()
        wrapped = {module: dict(module._modules) for module in inner.modules()}
        heads = {head.original_module: head.modules_to_save[ADAPTER] for head in _heads(model)}
        put_back(self.children)
        replace_modules(inner, heads)
        try:
            yield inner
        finally:
            put_back(wrapped)

    def unmerge(self, model: nn.Module) -> None:
        if not self.unmerged:
            return
        with quiet(*NOISE):
            model.base_model.unmerge_adapter()
        for layer, name, parameter in self.unmerged:
            merged = layer._parameters[name]
            parameter.data = parameter.data.to(merged.device, merged.dtype)  # the model may have moved meanwhile
            layer._parameters[name] = parameter
        self.unmerged.clear()

    def detach(self, model: nn.Module) -> nn.Module:
        for head in _heads(model):
            head.original_module.load_state_dict(head.modules_to_save[ADAPTER].state_dict())
        inner = model.get_base_model()
        self.restore(inner)
        return inner

    def restore(self, inner: nn.Module) -> None:
        """Give what PEFT has changed its modules and its `requires_grad` flags back."""
        put_back(self.children)
        vars(inner).pop("peft_config", None)
        for name, parameter in inner.named_parameters():
            parameter.requires_grad_(self.required_grad[name])

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained parameters by their names in the model, which PEFT's file may hold in another form."""
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def idle_numel(self, model: nn.Module) -> int:
        """The untrained originals that PEFT keeps beside modules trained in full."""
        return sum(p.numel() for head in _heads(model) for p in head.original_module.parameters())


def wrap(
    model: nn.Module, config: Any, settings: AdapterSettings, trained: Sequence[str], seed: int | None
) -> nn.Module:
    """PEFT's model of `config` around `model`; all of it or, on an error, nothing.

    Args:
        seed: of the initial values, which leaves the global generators as they are: PEFT takes no generator of ours.

    Raises:
        ParameterError: PEFT refuses, or a type found nothing to act on, which PEFT does not mind.
    """
    from peft import get_peft_model

    prepare_four_bit(model, trained)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    children = {module: dict(module._modules) for module in model.modules()}
    attachment = PeftAttachment("peft", settings, {}, tuple(trained), flags, batches_seen(model, trained), children)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with quiet(*NOISE), torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            wrapper = get_peft_model(model, config)
        heads = {id(p) for head in _heads(wrapper) for p in head.parameters()}
        own = any(p.requires_grad and p.numel() and id(p) not in heads for p in wrapper.parameters())
        if not own and not config.inference_mode:
            raise ValueError("nothing in this model would be trained")
    except Exception as error:  # PEFT raises what it happens to: whatever it is, the model must not stay half changed
        attachment.restore(model)
        told = f"PEFT refuses: {' '.join(str(error).split())}"
        raise ParameterError("peft_type", config.peft_type.value, told) from error
    wrapper.train(model.training)
    wrapper.register_forward_pre_hook(before_forward, with_kwargs=True)
    wrapper.register_forward_hook(after_forward, with_kwargs=True)
    wrapper.lorakit_attachment = attachment
    return wrapper


def attach_file(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Attach to the bare `model` what PEFT stored in `folder`; returns the wrapper.

    Raises:
        CheckpointError: it does not fit; the model is then as it was.
        ParameterError: PEFT refuses it.
    """
    config = files.read_config(folder)
    plain = config.to_dict()
    require_quick(model, plain)
    told = {name: plain[name] for name in ("init_lora_weights", *KNOWN["change_base"]) if name in plain}
    require_frozen_base(told, "adapter_config.json")
    config.inference_mode = not files.holds_weights(config)
    named = getattr(config, "modules_to_save", None) or []
    trained = [path for path, _ in model.named_modules() if any(name_matches(name, path) for name in named)]
    wrapper = wrap(model, config, AdapterSettings(), trained, seed=0)
    try:
        files.put(wrapper, tensors)
    except CheckpointError:
        detach(wrapper)
        raise
    return wrapper


def put_back(children: Mapping[nn.Module, Mapping[str, nn.Module]]) -> None:
    for module, named in children.items():
        module._modules.clear()
        module._modules.update(named)


def _heads(wrapper: nn.Module) -> list[Any]:
    """The modules trained in full, each beside its original."""
    from peft.utils import ModulesToSaveWrapper

    return [module for module in wrapper.modules() if isinstance(module, ModulesToSaveWrapper)]


def _base_layers(wrapper: nn.Module) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module.get_base_layer() for module in wrapper.modules() if isinstance(module, BaseTunerLayer)]
