"""PEFT's types by name, and which of them cannot run here and why."""

import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from lorakit.base.nf4 import is_four_bit
from lorakit.errors import require
from lorakit.files import CONFIGS
from lorakit.head import kind_of, task_head
from lorakit.modules import is_conv1d

VARIANTS = {"DORA": ("LORA", {"use_dora": True}), "RSLORA": ("LORA", {"use_rslora": True})}  # LoRA with a flag

# what its types cannot do, need and print
KNOWN = json.loads((CONFIGS / "peft.json").read_text(encoding="utf-8"))

# Why a type cannot run: on any model ("any"), on a kind of model (classify, masked, causal; "score": a decoder that
# classifies), on a model type, on Conv1D layers, on layers in 4 bits, or with modules trained in full ("head").
CANNOT: dict[str, dict[str, str]] = {}
for one in KNOWN["cannot_run"]:
    for name in one["types"]:
        CANNOT.setdefault(name, {}).update(dict.fromkeys(one["on"], one["why"]))


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
