"""What is trained: attach / detach, merge / unmerge, save / load; LoRA, head only, everything."""

from lorakit.adapters.attach import (
    METHODS,
    Attachment,
    adapter_layers,
    attach,
    detach,
    is_merged,
    merge,
    merged,
    unmerge,
)
from lorakit.adapters.checkpoint import load_adapter, save_adapter
from lorakit.adapters.layer import AdapterLayer, AdapterSettings
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.state import adapter_bytes, adapter_state, load_adapter_state, parameter_stats

__all__ = [
    "METHODS",
    "AdapterLayer",
    "AdapterSettings",
    "Attachment",
    "LoRALayer",
    "adapter_bytes",
    "adapter_layers",
    "adapter_state",
    "attach",
    "detach",
    "is_merged",
    "load_adapter",
    "load_adapter_state",
    "merge",
    "merged",
    "parameter_stats",
    "save_adapter",
    "unmerge",
]
