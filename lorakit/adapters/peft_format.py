"""PEFT's adapter files: `adapter_config.json` and tensors named `base_model.model.<path>.lora_A.weight`, both ways."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attachment import Attachment, tied_names
from lorakit.adapters.layer import ADAPTERS, AdapterLayer
from lorakit.errors import CheckpointError
from lorakit.head import kind_of, task_head
from lorakit.modules import inside, is_conv1d, is_linear, name_matches
from lorakit.settings import AdapterSettings

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# read below, or told by the tensors' names already, or of no effect on the output
_COMMON_FIELDS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "runtime_config", "bias", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# methods whose factors PEFT keeps as bare parameters: `<path>.hira_A`, where LoRA's are modules: `<path>.lora_A.weight`
_BARE_PARAMETERS = {"HIRA"}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter file as read: what to attach, and the tensors under the names `Attachment.tensors` uses."""

    method: str
    settings: AdapterSettings
    targets: Mapping[str, AdapterSettings]
    trained: Sequence[str]
    tensors: Mapping[str, Tensor]


def to_config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """The `adapter_config.json` of what is attached."""
    adapter, common, targets = ADAPTERS[attachment.method], attachment.settings, attachment.targets
    kind, head = kind_of(model), task_head(model)
    task = "CAUSAL_LM" if kind == "causal" else None
    if kind == "classify" and head and set(head) <= set(attachment.trained):
        task = "SEQ_CLS"  # PEFT expects a trained head of it, so without one none is named
    config = {
        "peft_type": adapter.peft_type,
        "task_type": task,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(path).base_layer) for path in targets),
        "target_modules": list(targets),
        "modules_to_save": list(attachment.trained) or None,
        "rank_pattern": {path: own.rank for path, own in targets.items() if own.rank != common.rank},
        "alpha_pattern": {path: own.alpha for path, own in targets.items() if own.alpha != common.alpha},
        **adapter.settings_to_peft(common),
    }
    absent = () if adapter.has_alpha else ("bias", "alpha_pattern")  # HiraConfig warns of fields it does not have
    return {name: value for name, value in config.items() if name not in absent}


def name_in_file(method: str, name: str) -> str:
    """What the file calls the tensor that `Attachment.tensors` calls `name`."""
    bare = name.removesuffix(".weight")
    return PREFIX + (bare if _is_bare(ADAPTERS[method], bare) else name)


def _is_bare(adapter: type[AdapterLayer], name: str) -> bool:
    """Whether `name` is that of a factor which the file holds as a parameter, not as a module's weight."""
    return adapter.peft_type in _BARE_PARAMETERS and name.rpartition(".")[2] in adapter.parameter_names


def read(model: nn.Module, config: dict[str, Any], raw: dict[str, Tensor]) -> StoredAdapter:
    """What `config` and its tensors ask to attach to `model`.

    Raises:
        CheckpointError: another method, a PEFT feature lorakit lacks, or a layer that `model` does not have.
        ParameterError: a setting out of range.
    """
    types = {name: adapter.peft_type for name, adapter in ADAPTERS.items()}
    method = next((name for name, kind in types.items() if kind == config.get("peft_type")), None)
    if method is None:
        known = ", ".join(dict.fromkeys(types.values()))
        raise CheckpointError(f"peft_type={config.get('peft_type')!r}: must be one of {known}")
    _refuse_foreign(config, ADAPTERS[method].peft_fields)
    tensors = {}
    for stored, tensor in raw.items():
        name = stored.removeprefix(PREFIX)
        tensors[f"{name}.weight" if _is_bare(ADAPTERS[method], name) else name] = tensor
    settings = ADAPTERS[method].settings_from_peft(config)
    targets = {
        path: _own_settings(config, settings, method, path, tensors) for path in _adapted_paths(model, method, tensors)
    }
    for name, first in tied_names(model).items():  # stored under each name, or by older versions under one
        if name in tensors and first in tensors and not torch.equal(tensors[name], tensors.pop(first)):
            raise CheckpointError(f"{name} and {first} differ in the file, and are one tensor in this model")
        if name in tensors:
            tensors[first] = tensors.pop(name)
    others = [name for name in tensors if not inside(name, list(targets))]
    others += [name for name, first in tied_names(model).items() if first in others]
    listed = config.get("modules_to_save") or []  # PEFT lists some that no model has
    paths = [path for path, _ in model.named_modules() if any(name_matches(name, path) for name in listed)]
    trained = [path for path in paths if any(inside(name, [path]) for name in others)]
    return StoredAdapter(method, settings, targets, trained, tensors)


def _refuse_foreign(config: dict[str, Any], fields: frozenset[str]) -> None:
    """Refuse PEFT features that would change the output and that lorakit does not have."""
    for name, value in config.items():
        if value and name not in _COMMON_FIELDS | fields:
            raise CheckpointError(f"{name}={value!r}: a PEFT feature that lorakit does not have")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"bias={config['bias']!r}: must be 'none'")


def _adapted_paths(model: nn.Module, method: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Paths of the layers the file adapts, in the model's order; its tensors' names say which those are."""
    suffixes = tuple(f".{name}.weight" for name in ADAPTERS[method].parameter_names)
    wanted = {name.removesuffix(end): name for end in suffixes for name in tensors if name.endswith(end)}
    modules = {path: getattr(module, "base_layer", module) for path, module in model.named_modules()}
    for path, name in wanted.items():
        if path not in modules or not is_linear(modules[path]):
            shape = tuple(tensors[name].shape)
            raise CheckpointError(f"the adapter is for another base: {name} {shape}: this model has no linear {path}")
    return [path for path in modules if path in wanted]


def _own_settings(
    config: dict[str, Any], settings: AdapterSettings, method: str, path: str, tensors: Mapping[str, Tensor]
) -> AdapterSettings:
    A = tensors.get(f"{path}.{ADAPTERS[method].parameter_names[0]}.weight")
    if ADAPTERS[method].has_alpha or A is None or not A.ndim:
        rank = _pattern_value(config.get("rank_pattern"), path, settings.rank)
    else:  # the tensors alone say it: PEFT 0.21 writes HiRA's rank_pattern and ignores it
        rank = A.shape[0]
    alpha = _pattern_value(config.get("alpha_pattern"), path, settings.alpha)
    return settings.but(rank=rank, alpha=alpha)


def _pattern_value(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of the path."""
    matching = [value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)]
    return matching[0] if matching else default
