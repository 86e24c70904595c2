"""Attach an adapter to a model in place and take it off again, leaving the model as it was."""

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Generator, nn

from lorakit.adapters.attachment import TRAINED, Attachment, batches_seen, require_bare, tied_names
from lorakit.adapters.layer import ADAPTERS
from lorakit.adapters.saving import save_pretrained
from lorakit.base.mending import prepare_four_bit
from lorakit.errors import ParameterError, require
from lorakit.head import output_head
from lorakit.modules import inside, replace_modules, resolve_targets, resolve_trainable, unwrapping
from lorakit.settings import AdapterSettings, AttachSettings


class Attaching(AttachSettings, AdapterSettings):
    """What `attach` may be told of a run's parameters."""


ALPHA = AdapterSettings().alpha  # where none is given


def methods() -> list[str]:
    """What can be trained: every adapter that is registered, any method of PEFT, the task head alone, everything."""
    return [*ADAPTERS, "peft", "head", "full"]


@unwrapping
def attach(
    model: nn.Module,
    method: str = "lora",
    *,
    trainable: str | Sequence[str] = "head",
    seed: int | None = None,
    total_steps: int | None = None,
    **asked: Any,
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
    require(method in methods(), "method", method, f"unknown method; known are {', '.join(methods())}")
    if isinstance(asked.get("target_modules"), (tuple, set)):
        asked["target_modules"] = list(asked["target_modules"])
    whole = Attaching(**{"alpha": None, "method": method} | asked)
    default = ALPHA if getattr(ADAPTERS.get(method), "has_alpha", True) else None
    settings = AdapterSettings.of(whole).but(alpha=whole.alpha or default)
    require_bare(model, method)
    trained = _trained_modules(model, method, trainable)
    if method == "peft":
        from lorakit.adapters.peft.config import build_config
        from lorakit.adapters.peft.method import wrap

        return wrap(model, build_config(model, whole, settings, trained, total_steps), settings, trained, seed)
    targets = resolve_targets(model, whole.target_modules, trained) if method in ADAPTERS else []
    return attach_to(model, method, settings, dict.fromkeys(targets, settings), trained, seed)


def asked_of(run: Attaching) -> dict[str, Any]:
    """What a run's parameters ask of `attach`; the default alpha is left for the method to say, which may have none."""
    asked = {name: getattr(run, name) for name in Attaching.model_fields}
    return {name: value for name, value in asked.items() if name != "alpha" or value != ALPHA}


def attach_to(
    model: nn.Module,
    method: str,
    settings: AdapterSettings,
    targets: Mapping[str, AdapterSettings],
    trained: Sequence[str],
    seed: int | None = None,
) -> nn.Module:
    """`attach` to a model without an adapter, with the paths already resolved and settings for each layer."""
    if method in ADAPTERS:
        _require_untied(model, trained)
    prepare_four_bit(model, trained)
    generator = None if seed is None else Generator().manual_seed(seed)
    bases = {path: model.get_submodule(path) for path in targets}
    wrapped = {bases[path]: ADAPTERS[method](bases[path], own, generator) for path, own in targets.items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for path in trained:
        for parameter in model.get_submodule(path).parameters():
            if parameter.is_floating_point():  # packed 4-bit weights cannot take a gradient
                parameter.requires_grad_(True)
                TRAINED[parameter] = weakref.ref(model)
    replace_modules(model, wrapped)
    model.lorakit_attachment = Attachment(method, settings, targets, trained, flags, batches_seen(model, trained))
    if method in ADAPTERS and hasattr(model, "save_pretrained"):
        model.save_pretrained = functools.partial(save_pretrained, model)
        if getattr(model, "is_quantized", False):  # by transformers, whose Trainer refuses it unless it has adapters
            model._hf_peft_config_loaded = True
    return model


def _trained_modules(model: nn.Module, method: str, trainable: str | Sequence[str]) -> list[str]:
    if method == "full":
        require(any(p.is_floating_point() for p in model.parameters()), "method", method, "no trainable parameters")
        return [""]
    trained = resolve_trainable(model, trainable)
    if method == "head":
        trained = trained or (output_head(model) if trainable == "head" else [])
        require(trained != [], "trainable", trainable, "no trainable parameters: name the modules to train")
    return trained


def _require_untied(model: nn.Module, trained: Sequence[str]) -> None:
    """Refuse to train a weight shared with a frozen module: PEFT's format stores it as if it were not shared."""
    for names in tied_names(model).items():
        inner, outer = sorted(names, key=lambda name: not inside(name, trained))
        if inside(inner, trained) and not inside(outer, trained):
            raise ParameterError("trainable", inner, f"shares its weight with the frozen {outer}: name neither")
