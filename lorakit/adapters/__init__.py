"""What is trained: attach / detach, merge / unmerge, save / load; LoRA, head only, everything."""

from lorakit.adapters.attach import (
    METHODS,
    Attachment,
    adapter_layers,
    attach,
    can_merge,
    detach,
    is_merged,
    merge,
    merged,
    unmerge,
)
from lorakit.adapters.checkpoint import load_adapter, save_adapter
from lorakit.adapters.compact import compact
from lorakit.adapters.hira import HiRALayer
from lorakit.adapters.layer import AdapterLayer, AdapterSettings
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.quantized import quantize_nf4, requantisation_error
from lorakit.adapters.sparse import SparseSettings
from lorakit.adapters.state import adapter_bytes, adapter_state, load_adapter_state, parameter_stats
from lorakit.adapters.zeros import sparsity_report

__all__ = [
    "METHODS",
    "AdapterLayer",
    "AdapterSettings",
    "Attachment",
    "HiRALayer",
    "LoRALayer",
    "SparseSettings",
    "adapter_bytes",
    "adapter_layers",
    "adapter_state",
    "attach",
    "can_merge",
    "compact",
    "detach",
    "is_merged",
    "load_adapter",
    "load_adapter_state",
    "merge",
    "merged",
    "parameter_stats",
    "quantize_nf4",
    "requantisation_error",
    "save_adapter",
    "sparsity_report",
    "unmerge",
]
