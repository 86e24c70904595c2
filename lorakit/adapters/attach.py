"""Attach an adapter to a model in place and take it off again, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, nn

from lorakit.adapters.hira import HiRALayer
from lorakit.adapters.layer import AdapterLayer, AdapterSettings
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.nf4 import prepare_four_bit
from lorakit.adapters.targets import inside, output_head, resolve_targets, resolve_trainable
from lorakit.errors import LorakitError, ParameterError, require
from lorakit.rows import METHODS

# Sparse LoRA is LoRA with zeros, which training puts there: see `sparse`.
ADAPTERS: dict[str, type[AdapterLayer]] = {"lora": LoRALayer, "sparse": LoRALayer, "hira": HiRALayer}
ALPHA = 16.0  # where none is given


@dataclass(frozen=True)
class Attachment:
    """What `attach` did to a model; kept on the model as `lorakit_attachment`, names only."""

    method: str
    settings: AdapterSettings
    targets: Mapping[str, AdapterSettings]  # path of each adapted linear layer -> its own settings
    trained: Sequence[str]  # paths of the modules trained in full; "" is the whole model
    required_grad: Mapping[str, bool] = field(repr=False)  # of every parameter, before


def attach(
    model: nn.Module,
    method: str = "lora",
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    trainable: str | Sequence[str] = "head",
    init: str = "kaiming",
    rslora: bool = False,
    seed: int | None = None,
    peft_type: str = "",
    peft_options: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
) -> nn.Module:
    """Freeze `model`, give it what `method` trains, and return it (changed in place; "peft": PEFT's wrapper around it).

    Args:
        method: "lora", "sparse" (LoRA, whose zeros training puts there) or "hira" (adapters on `target_modules`, and
            `trainable`), "peft" (any of PEFT's, by `peft_type`), "head" (only `trainable`; for a language model "head"
            is its output embeddings' module, and an embedding tied to it is trained with it), "full".
        rank, alpha, dropout, init, rslora: see `AdapterSettings`; alpha None is 16 for methods that have one (HiRA has
            none); unused by "head" and "full".
        target_modules: "all-linear", a list of names (the path or its end), or a regular expression on the whole path.
        trainable: modules trained in full beside the adapters: "head" (a classification model's task head), a list of
            names, or (). Unused by "full".
        seed: of the adapters' initial values, drawn without touching torch's global generator; None draws from that.
        peft_type, peft_options: of method "peft": a type of PEFT, in any case (DORA, ADALORA, VERA, …), and fields of
            its config, which win over everything else given here.
        total_steps: optimizer steps to come, for a type with a schedule of its own (ADALORA).

    Raises:
        ParameterError: a parameter is out of range, a name matches nothing, the model already has an adapter, or
            nothing would be trained. The model is then as it was.
    """
    require(method in METHODS, "method", method, f"unknown method; known are {', '.join(METHODS)}")
    alpha = _alpha_of(method, alpha, rslora)
    settings = AdapterSettings(rank=rank, alpha=alpha, dropout=dropout, init=init, rslora=rslora)
    _require_bare(model, method)
    trained = _trained_modules(model, method, trainable)
    if method == "peft":
        from lorakit.adapters.peft_method import attach_peft

        return attach_peft(model, peft_type, peft_options or {}, settings, target_modules, trained, seed, total_steps)
    targets = resolve_targets(model, target_modules, trained) if method in ADAPTERS else []
    return attach_to(model, method, settings, dict.fromkeys(targets, settings), trained, seed)


def _alpha_of(method: str, alpha: float | None, rslora: bool) -> float | None:
    """The scale `method` gets: the one given, the default, or none at all."""
    if method not in ADAPTERS or ADAPTERS[method].has_alpha:
        return ALPHA if alpha is None else alpha
    require(alpha is None, "alpha", alpha, f"method {method!r} has no alpha: its update is not scaled")
    require(not rslora, "rslora", rslora, f"method {method!r} has no alpha, so nothing to rescale")
    return None


def attach_to(
    model: nn.Module,
    method: str,
    settings: AdapterSettings,
    targets: Mapping[str, AdapterSettings],
    trained: Sequence[str],
    seed: int | None = None,
) -> nn.Module:
    """`attach` with the paths already resolved and settings for each layer."""
    _require_bare(model, method)
    if method in ADAPTERS:
        _require_untied(model, trained)
    prepare_four_bit(model, trained)
    generator = None if seed is None else Generator().manual_seed(seed)
    bases = {path: model.get_submodule(path) for path in targets}
    wrapped = {bases[path]: ADAPTERS[method](bases[path], own, generator) for path, own in targets.items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for path in trained:
        _unfreeze(model.get_submodule(path))
    replace_modules(model, wrapped)
    model.lorakit_attachment = Attachment(method, settings, dict(targets), tuple(trained), flags)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the adapter off: the original modules and `requires_grad` flags are back, merged weights are unmerged.

    Modules trained in full keep their trained values.
    """
    attachment = attachment_of(model)
    if attachment.method == "peft":
        from lorakit.adapters.peft_method import detach_peft

        return detach_peft(model)
    unmerge(model)
    replace_modules(model, {layer: layer.base_layer for layer in adapter_layers(model).values()})
    del model.lorakit_attachment
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(attachment.required_grad.get(name, parameter.requires_grad))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into its base weight, for inference without the adapter's cost.

    Costs a second copy of the adapted weights while merged, which is what makes `unmerge` exact. Merging twice is
    merging once; "head" and "full" have nothing to merge.

    Raises:
        LorakitError: a type of PEFT that cannot be merged (see `can_merge`).
    """
    if attachment_of(model).method == "peft":
        from lorakit.adapters.peft_method import merge_peft

        return merge_peft(model)
    for layer in adapter_layers(model).values():
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: the base weights are back bit for bit."""
    if attachment_of(model).method == "peft":
        from lorakit.adapters.peft_method import unmerge_peft

        return unmerge_peft(model)
    for layer in adapter_layers(model).values():
        layer.unmerge()
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """`with merged(model):` runs merged and leaves the model as it found it."""
    before = is_merged(model)
    try:
        yield merge(model)
    finally:
        if not before:
            unmerge(model)


def can_merge(model: nn.Module) -> bool:
    """Whether `merge` has something to fold into the weights and can; a prompt, say, is no weight."""
    if attachment_of(model).method == "peft":
        from lorakit.adapters.peft_method import merge_obstacle

        return not merge_obstacle(model)
    return bool(adapter_layers(model))


def is_merged(model: nn.Module) -> bool:
    if getattr(model, "lorakit_unmerged", None):  # a PEFT method's
        return True
    return any(layer.is_merged for layer in adapter_layers(model).values())


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def attachment_of(model: nn.Module) -> Attachment:
    """What was attached to `model`.

    Raises:
        LorakitError: nothing was.
    """
    attachment = getattr(model, "lorakit_attachment", None)
    if attachment is None:
        raise LorakitError(f"this {type(model).__name__} has no adapter; call attach(model) first")
    return attachment


def _require_bare(model: nn.Module, method: str) -> None:
    attachment = getattr(model, "lorakit_attachment", None)
    if attachment is not None:
        raise ParameterError("method", method, f"the model already has {attachment.method!r}; detach(model) first")


def _trained_modules(model: nn.Module, method: str, trainable: str | Sequence[str]) -> list[str]:
    if method == "full":
        require(any(p.is_floating_point() for p in model.parameters()), "method", method, "no trainable parameters")
        return [""]
    trained = resolve_trainable(model, trainable)
    if method == "head":
        trained = trained or (output_head(model) if trainable == "head" else [])
        require(bool(trained), "trainable", trainable, "no trainable parameters: name the modules to train")
    return trained


def _require_untied(model: nn.Module, trained: Sequence[str]) -> None:
    """Refuse to train a weight shared with a frozen module: PEFT's format stores it as if it were not shared."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    for names in owners.values():
        inner = [name for name in names if inside(name, trained)]
        if inner and len(inner) < len(names):
            other = next(name for name in names if name not in inner)
            raise ParameterError("trainable", inner[0], f"shares its weight with the frozen {other}: name neither")


def _unfreeze(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point():  # packed 4-bit weights cannot take a gradient
            parameter.requires_grad_(True)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[child]` in place of every `child`, under every name it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new and not (isinstance(parent, AdapterLayer) and name == "base_layer"):
                setattr(parent, name, new[child])
