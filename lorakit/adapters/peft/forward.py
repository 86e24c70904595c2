"""What stands around the forward of PEFT's model, so that it takes and gives what every other model here does."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import LorakitError
from lorakit.head import IGNORED

ADAPTER = "default"  # PEFT's name of a model's only adapter


def config_of(wrapper: nn.Module) -> Any:
    return wrapper.peft_config[ADAPTER]


def _inserts_tokens(config: Any) -> bool:
    """Whether virtual tokens stand before the real ones, so that the logits are longer than the input."""
    return config.is_prompt_learning and config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE")


def before_forward(wrapper: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse what PEFT would compute wrongly, and put into `kwargs`, which are the call's own, what it lacks."""
    if wrapper.lorakit_attachment.unmerged and wrapper.training and torch.is_grad_enabled():
        raise LorakitError("the adapter is merged into the base weights; unmerge(model) before training")
    if not wrapper.has_active_enabled_adapter:
        return
    config = config_of(wrapper)
    if config.is_prompt_learning and kwargs.get("position_ids") is not None:
        raise LorakitError(f"{config.peft_type.value} cannot train on packed rows: PEFT drops their positions")
    if config.peft_type in ("POLY", "MULTITASK_PROMPT_TUNING") and kwargs.get("task_ids") is None:
        ids = args[0] if args else kwargs["input_ids"]
        kwargs["task_ids"] = ids.new_zeros(len(ids))  # a run has one task
    labels = kwargs.get("labels")
    if labels is not None and _inserts_tokens(config) and config.task_type == "FEATURE_EXTRACTION":
        kwargs["labels"] = F.pad(labels, (config.num_virtual_tokens, 0), value=IGNORED)


def after_forward(wrapper: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
    """Cut the virtual tokens' logits off, so that logits and labels stand side by side."""
    logits = getattr(outputs, "logits", None) if wrapper.has_active_enabled_adapter else None
    if logits is not None and logits.dim() == 3 and _inserts_tokens(config_of(wrapper)):
        outputs.logits = logits[:, config_of(wrapper).num_virtual_tokens :]
