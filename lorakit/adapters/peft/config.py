"""PEFT's config of a type from lorakit's parameters: what the type calls rank, alpha and dropout, and where it goes."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.peft.types import KNOWN, model_type, refusal, resolve_type
from lorakit.adapters.peft_format import BOOKKEEPING
from lorakit.errors import ParameterError, require, retold
from lorakit.head import kind_of
from lorakit.modules import ALL_LINEAR, blocks, resolve_targets
from lorakit.quiet import quiet
from lorakit.settings import AdapterSettings, AttachSettings

VIRTUAL_TOKENS = 8  # of the prompt methods, where peft_options do not say

NOISE = KNOWN["noise"]  # what PEFT says about itself, not about what the user asked for; some with the reason


def build_config(
    model: nn.Module, asked: AttachSettings, settings: AdapterSettings, trained: Sequence[str], total_steps: int | None
) -> Any:
    """The config of PEFT for `peft_type`; `peft_options` win over everything that lorakit would choose.

    Raises:
        ParameterError: an unknown type or option, a parameter the type does not have, or a type that cannot run here.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind, flags = resolve_type(asked.peft_type)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    allowed = {field.name for field in fields(config_class) if field.name not in BOOKKEEPING}
    _check_options(kind, asked.peft_options, allowed)
    values = {"task_type": _task_type(model, trained)} | flags
    if "target_modules" in allowed:
        values |= _targets(model, kind, asked.target_modules, trained)
    if "modules_to_save" in allowed:
        values["modules_to_save"] = list(trained) or None
    values |= _settings(kind, allowed, settings)
    values |= _own_defaults(model, kind, allowed, settings, total_steps)
    values |= asked.peft_options
    if reason := refusal(model, kind, values.get("target_modules"), trained):
        raise ParameterError("peft_type", kind, f"cannot run on this {type(model).__name__}: {reason}")
    if kind in KNOWN["needs"]:  # what only the user can say
        needed, must_be = KNOWN["needs"][kind]
        require(bool(values.get(needed)), f"peft_options.{needed}", values.get(needed), must_be)
    refused = (ValueError, TypeError, AttributeError, KeyError)
    with retold(refused, ParameterError, "peft_options", asked.peft_options, f"PEFT's {kind}"), quiet(*NOISE):
        return config_class(**values)


def _check_options(kind: str, options: Mapping[str, Any], allowed: set[str]) -> None:
    for name in options:
        fits = f"unknown option {name!r} of {kind}; known are {', '.join(sorted(allowed))}"
        require(name in allowed, "peft_options", options, fits)
    require_frozen_base(options, "peft_options")
    for name, why in KNOWN["cannot_follow"].items():
        require(not options.get(name), "peft_options", options, f"{name!r} {why}")


def require_frozen_base(options: Mapping[str, Any], parameter: str) -> None:
    """Refuse fields of a config of PEFT that change the base in ways neither detaching nor an adapter file undoes."""
    for name, value in options.items():
        unsafe = value not in LoRALayer.peft_inits if name == "init_lora_weights" else name in KNOWN["change_base"]
        if unsafe and value and value != "none":
            raise ParameterError(parameter, options, f"{name}={value!r} changes the base, which stays frozen here")


def _task_type(model: nn.Module, trained: Sequence[str]) -> str | None:
    """PEFT's name of the model's task; it trains the head of a sequence classifier, so without one none is named.

    With no name PEFT calls the model past its own code, which leaves virtual tokens and task ids out: for a masked
    language model it has no better name than that of a model whose outputs it does not look at.
    """
    if (task := kind_of(model)) == "classify":
        return "SEQ_CLS" if trained else None
    return {"masked": "FEATURE_EXTRACTION", "causal": "CAUSAL_LM"}.get(task)


def _targets(model: nn.Module, kind: str, wanted: str | Sequence[str], trained: Sequence[str]) -> dict[str, Any]:
    """Where the adapters go: linear layers, except for the types that act on something else."""
    every = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
    others = {
        "LN_TUNING": lambda m: type(m).__name__.endswith("Norm"),
        "TRAINABLE_TOKENS": lambda m: m is model.get_input_embeddings(),
        "SHADOW": blocks(model).__contains__,
    }
    if kind in ("ADAPTION_PROMPT", "XLORA"):
        return {}
    if kind == "IA3" and every:
        return KNOWN["ia3"].get(model_type(model), {})  # PEFT has its own for models it knows
    if kind in others:
        found = [path for path, m in model.named_modules() if others[kind](m)] if every else wanted
    else:
        found = resolve_targets(model, wanted, trained)
    if kind == "POLY" and every:  # its layers take (B, T, in) alone, and a pooler's input is (B, in)
        found = [path for path in found if "pooler" not in path]
    return {"target_modules": found} | ({"feedforward_modules": []} if kind == "IA3" else {})


def _settings(kind: str, allowed: set[str], settings: AdapterSettings) -> dict[str, Any]:
    """lorakit's parameters under the type's names; one it does not have may only have its default value."""
    dropout = next((name for name in (f"{kind.lower()}_dropout", "lora_dropout") if name in allowed), "")
    names = {
        # "": the type has an `r` that means something else
        "rank": KNOWN["rank"].get(kind, "r" if "r" in allowed else ""),
        "alpha": KNOWN["alpha"].get(kind, ""),
        "dropout": "" if kind == "SUPERTUNING" else dropout,
        "init": "init_lora_weights" if kind == "LORA" else "",
        "rslora": "use_rslora" if kind == "LORA" and settings.rslora else "",  # else a variant may set it
    }
    found = {}
    for own, theirs in names.items():
        value = getattr(settings, own)
        if theirs:
            found[theirs] = value
        else:
            require(value == getattr(AdapterSettings(), own), own, value, f"PEFT's {kind} has no {own}")
    if kind == "LORA":
        found["init_lora_weights"] = "gaussian" if settings.init == "gaussian" else True
    return found


def _own_defaults(
    model: nn.Module, kind: str, allowed: set[str], settings: AdapterSettings, total_steps: int | None
) -> dict[str, Any]:
    """What PEFT leaves open, asks of the model, or would ask on the terminal."""
    config = getattr(model, "config", None)
    values: dict[str, Any] = {}
    if "num_virtual_tokens" in allowed:  # DistilBERT names its sizes as PEFT does not look for them
        width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
        values = {"token_dim": width, "num_attention_heads": heads, "num_virtual_tokens": VIRTUAL_TOKENS}
    own = {
        "ADALORA": {"init_r": -(-3 * settings.rank // 2), "total_step": total_steps},  # PEFT's own ratio, 12 to 8
        "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": getattr(config, "num_hidden_layers", None)},
        "FROD": {"progressbar": False},
        "SHADOW": {"auxiliary_loss_weight": 0.0},
    }
    return values | own.get(kind, {})
