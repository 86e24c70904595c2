"""PEFT's adapter files: `adapter_config.json` and tensors named `base_model.model.<path>.lora_A.weight`, both ways."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import create_model
from torch import Tensor, nn

from lorakit.adapters.attachment import Attachment, tied_names
from lorakit.adapters.layer import ADAPTERS, AdapterLayer
from lorakit.errors import CheckpointError
from lorakit.head import kind_of, task_head
from lorakit.modules import ALL_LINEAR, fullmatch, inside, is_conv1d, is_linear, linear_paths, name_matches
from lorakit.settings import AdapterSettings

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# of what, where and when a file was written, not of what it does
BOOKKEEPING = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
               "inference_mode")  # fmt: skip
# read below, or told by the tensors' names already, or of no effect on the output
_COMMON_FIELDS = {
    *(*BOOKKEEPING, "runtime_config", "bias", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
}
# methods whose factors PEFT keeps as bare parameters: `<path>.hira_A`, where LoRA's are modules: `<path>.lora_A.weight`
_BARE_PARAMETERS = {"HIRA"}
_TIED_BY_PEFT = ("embed_tokens", "lm_head")  # what `ensure_weight_tying` is heeded for; GPT-2's `wte` is left untied


# types of what is read below, and of `lorakit_config.json`, whatever else there is
_TYPES = {
    **dict.fromkeys(("peft_type", "task_type", "base_model_name_or_path", "bias", "method"), str | None),
    **dict.fromkeys(("init_lora_weights", "init_weights"), bool | str | None),
    **dict.fromkeys(("target_modules", "exclude_modules"), str | list[str] | None),
    **{"rank_pattern": dict[str, Any] | None, "alpha_pattern": dict[str, float] | None},  # AdaLoRA's ranks are masks
    **{"modules_to_save": list[str] | None, "trained": list[str]},
}
ConfigShape = create_model("ConfigShape", **{name: (kind, None) for name, kind in _TYPES.items()})


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
        "modules_to_save": attachment.trained or None,
        "rank_pattern": {_key(path): own.rank for path, own in targets.items() if own.rank != common.rank},
        "alpha_pattern": {_key(path): own.alpha for path, own in targets.items() if own.alpha != common.alpha},
        **adapter.settings_to_peft(common),
    }
    absent = () if adapter.has_alpha else ("bias", "alpha_pattern")  # HiraConfig warns of fields it does not have
    return {name: value for name, value in config.items() if name not in absent}


def _key(path: str) -> str:
    """A pattern of `path` alone: PEFT would find a bare one at the end of other paths too."""
    return f"^{re.escape(path)}"


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
    if (method := next((name for name, kind in types.items() if kind == config.get("peft_type")), None)) is None:
        known = ", ".join(dict.fromkeys(types.values()))
        raise CheckpointError(f"peft_type={config.get('peft_type')!r}: must be one of {known}")
    if feature := foreign_feature(config):
        raise CheckpointError(f"{feature}={config[feature]!r}: a PEFT feature that lorakit does not have")
    tensors = {}
    for stored, tensor in raw.items():
        name = stored.removeprefix(PREFIX)
        tensors[f"{name}.weight" if _is_bare(ADAPTERS[method], name) else name] = tensor
    settings = ADAPTERS[method].settings_from_peft(config)
    adapted = _adapted_paths(model, method, tensors)
    targets = {path: _own_settings(config, settings, method, path, tensors) for path in adapted}
    listed = config.get("modules_to_save") or []  # PEFT lists some that no model has
    paths = [path for path, _ in model.named_modules() if any(name_matches(name, path) for name in listed)]
    for name, first in tied_names(model).items():  # stored under each name, or by older versions under one
        if name in tensors and first in tensors and not torch.equal(tensors[name], tensors.pop(first)):
            raise CheckpointError(f"{name} and {first} differ in the file, and are one tensor in this model")
        if name in tensors:
            tensors[first] = tensors.pop(name)
    embeddings = _embeddings(model, tensors, paths)
    others = [name for name in tensors if not inside(name, [*targets])]
    others += [name for name, first in tied_names(model).items() if first in others]
    trained = [path for path in [*paths, *embeddings] if any(inside(name, [path]) for name in others)]
    absent = [path for path in paths if path not in trained and [*model.get_submodule(path).parameters()]]
    if absent := absent or _lacking(model, config, targets, paths):
        raise CheckpointError(f"the file lacks {len(absent)} of the layers its config names, first {absent[0]}")
    if embeddings or config.get("ensure_weight_tying") and any(path.endswith(_TIED_BY_PEFT) for path in paths):
        trained += [name.rpartition(".")[0] for name in tied_names(model) if name in others]
    return StoredAdapter(method, settings, targets, trained, tensors)


def foreign_feature(config: Mapping[str, Any]) -> str:
    """The field of a PEFT config, of a type that lorakit has, that its layers cannot follow; empty: none."""
    fields = next(adapter.peft_fields for adapter in ADAPTERS.values() if adapter.peft_type == config["peft_type"])
    if config.get("bias") not in (None, "none"):
        return "bias"
    return next((name for name, value in config.items() if value and name not in _COMMON_FIELDS | fields), "")


def adapts_more(tensors: Mapping[str, Tensor]) -> bool:
    """Whether PEFT adapted what is no linear map: embeddings, convolutions."""
    return any("_embedding_" in name or (".lora_" in name and tensor.ndim > 2) for name, tensor in tensors.items())


def renamed(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` by today's names, where transformers has renamed the model's modules since they were stored."""
    paths = dict(model.named_modules())

    def known(name: str) -> bool:  # <path>.lora_A.weight, and of HiRA <path>.hira_A
        return name.rpartition(".")[0] in paths or (name.endswith(".weight") and name.rsplit(".", 2)[0] in paths)

    bare = {name: name.removeprefix(PREFIX) for name in tensors}
    if not hasattr(model, "config") or all(map(known, bare.values())):
        return tensors
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    today = {}
    for name, old in bare.items():
        new = reduce(lambda name, rule: rule.rename_source_key(name)[0], rules, old)
        today[name.replace(old, new) if known(new) and not known(old) else name] = tensors[name]
    return today


def _embeddings(model: nn.Module, tensors: dict[str, Tensor], trained: Sequence[str]) -> list[str]:
    """Paths of embeddings that the file holds unasked; those that are the base's leave `tensors`.

    Raises:
        CheckpointError: one, trained or not, is of another vocabulary.
    """
    ends = []
    for end in ("input", "output"):
        with contextlib.suppress(NotImplementedError):  # a model that names none
            ends.append(getattr(model, f"get_{end}_embeddings", lambda: None)())
    held = []
    for path, module in model.named_modules():
        given = tensors.get(f"{path}.weight")
        if given is None or not any(module is end for end in ends):
            continue
        own = module.weight
        if given.shape[1:] == own.shape[1:] and len(given) != len(own):
            shapes = f"{path}.weight is {tuple(given.shape)}, this model has {tuple(own.shape)}"
            remedy = f"model.resize_token_embeddings({len(given)}) first"
            raise CheckpointError(f"the adapter is for another vocabulary: {shapes}; {remedy}")
        if not inside(path, trained) and torch.equal(given.to(own.device, own.dtype), own):
            del tensors[f"{path}.weight"]
        elif not inside(path, trained):
            held.append(path)
    return held


def _lacking(
    model: nn.Module, config: Mapping[str, Any], targets: Mapping[str, Any], trained: Sequence[str]
) -> list[str]:
    """Linear layers that `config` names as PEFT reads it, and that are not among the `targets` its tensors show."""
    wanted = config.get("target_modules")
    if not targets or not wanted or wanted == ALL_LINEAR:
        return [] if targets else ["any"]
    apart = config.get("exclude_modules") or []
    linear = linear_paths(model)
    if config.get("layers_to_transform") not in (None, []):  # of some blocks only, by PEFT's rule
        from peft.tuners.tuners_utils import check_target_module_exists

        require_quick(model, config)
        asked = SimpleNamespace(target_modules=wanted)
        asked.layers_to_transform, asked.layers_pattern = config["layers_to_transform"], config.get("layers_pattern")
        linear = [path for path in linear if check_target_module_exists(asked, path)]
    left = [path for path in linear if not inside(path, [*targets, *trained])]
    named = [path for path in left if _names(wanted, path, "target_modules")]
    return [path for path in named if not _names(apart, path, "exclude_modules")]


def require_quick(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse patterns that PEFT, which gives up on none, would never be done with.

    Raises:
        ParameterError: naming the field.
    """
    whole, end = "{}", r"(.*\.)?({})"
    forms = {"target_modules": whole, "exclude_modules": whole, "rank_pattern": end, "alpha_pattern": end}
    for name, form in (forms | {"layers_pattern": end + r"\.\d+\..*"}).items():
        asked = config.get(name) or ()
        for pattern in [asked] if isinstance(asked, str) else asked if form != whole else ():
            for path, _ in model.named_modules():
                fullmatch(form.format(pattern), path, name)


def _names(wanted: str | Sequence[str], path: str, parameter: str) -> bool:
    if isinstance(wanted, str):
        return fullmatch(wanted, path, parameter)
    return any(name_matches(name, path) for name in wanted)


def _adapted_paths(model: nn.Module, method: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Paths of the layers the file adapts, in the model's order; its tensors' names say which those are."""
    ends = [f".{name}.weight" for name in ADAPTERS[method].parameter_names]
    wanted = {name.removesuffix(end): name for end in ends for name in tensors if name.endswith(end)}
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
    return settings.but(rank=rank, alpha=_pattern_value(config.get("alpha_pattern"), path, settings.alpha))


def _pattern_value(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of the path."""
    matching = (value for key, value in (pattern or {}).items() if fullmatch(rf"(.*\.)?({key})", path, "rank_pattern"))
    return next(matching, default)
