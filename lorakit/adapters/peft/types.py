"""PEFT's types by name, and which of them cannot run here and why."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorakit.base.nf4 import is_four_bit
from lorakit.errors import require
from lorakit.head import kind_of, task_head
from lorakit.modules import is_conv1d

VARIANTS = {"DORA": ("LORA", {"use_dora": True}), "RSLORA": ("LORA", {"use_rslora": True})}  # LoRA with a flag

_NO_CONV1D = "PEFT has no layer of this type for GPT-2's Conv1D"
_NO_4_BITS = "it reads the base's weights, which PEFT does not unpack from 4 bits for it"
_NO_HEAD = "its config has no modules_to_save, so the task head could not be trained with it"
_HIDES_PADDING = "a decoder's classifier finds the last token by its id, and virtual tokens hide the ids"
_LLAMA_ONLY = "PEFT has it for llama, mistral and gpt2 only"
_NO_PAST = "DistilBERT takes no keys and values from outside"
_CAUSAL_ONLY = "PEFT has it for causal language models only"
_READS_BASE = "ADAMSS LOHA LOKR GLORA HRA SHIRA OSF DELORA PSOFT PEANUT SUPERTUNING"

# Why a type cannot run: on any model ("any"), on a kind of model (classify, masked, causal; "score": a decoder that
# classifies), on a model type, on Conv1D layers, on layers in 4 bits, or with modules trained in full ("head").
CANNOT: dict[str, dict[str, str]] = {
    "XLORA": {"any": "it mixes LoRA adapters trained before; a row starts with none, so there is nothing to train"},
    "MULTITASK_PROMPT_TUNING": {
        "masked": "PEFT gives task ids to classifiers and causal language models only",
        "score": _HIDES_PADDING,
    },
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING"), {"score": _HIDES_PADDING}),
    **dict.fromkeys(("PREFIX_TUNING", "CARTRIDGE"), {"distilbert": _NO_PAST}),
    "CPT": {"classify": _CAUSAL_ONLY, "masked": _CAUSAL_ONLY},
    "ADAPTION_PROMPT": {**dict.fromkeys(("bert", "distilbert", "gemma3_text"), _LLAMA_ONLY), "head": _NO_HEAD},
    "TRAINABLE_TOKENS": {"head": _NO_HEAD},
    **dict.fromkeys(["BOFT", "BEFT", "LILY", "OFT", "POLY", "MISS", "ROAD", "C3A"], {"Conv1D": _NO_CONV1D}),
    **dict.fromkeys(["FROD", "TINYLORA", "DEFT"], {"4 bits": _NO_4_BITS}),
    **dict.fromkeys(_READS_BASE.split(), {"Conv1D": _NO_CONV1D, "4 bits": _NO_4_BITS}),
}


def resolve_type(peft_type: str) -> tuple[str, dict[str, Any]]:
    """PEFT's type and the flags of a variant of it.

    Raises:
        ParameterError: there is no such type; the message lists those there are.
    """
    from peft import PeftType

    known = [*(kind.value for kind in PeftType), *VARIANTS]
    name = peft_type.upper()
    require(name in known, "peft_type", peft_type, f"must be one of {', '.join(known)}")
    return VARIANTS.get(name, (name, {}))


def model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def refusal(model: nn.Module, kind: str, target_modules: Any, trained: Sequence[str]) -> str:
    """Why `kind` cannot run on `model`, or nothing."""
    reasons = CANNOT.get(kind, {})
    paths = target_modules if isinstance(target_modules, list) else []
    modules = dict(model.named_modules())
    tags = {
        "any": True,
        kind_of(model): True,
        "score": task_head(model) == ["score"],
        model_type(model): True,
        "Conv1D": any(is_conv1d(modules[path]) for path in paths if path in modules),
        "4 bits": any(is_four_bit(module) for module in modules.values()),
        "head": bool(trained),
    }
    return next((reasons[tag] for tag, here in tags.items() if here and tag in reasons), "")
