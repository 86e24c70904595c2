"""What is trained: attach / detach, merge / unmerge, save / load; LoRA, head only, everything."""

from lorakit.adapters.attach import asked_of, attach, methods
from lorakit.adapters.attachment import Attachment, adapter_layers, can_merge, detach, is_merged, merge, merged, unmerge
from lorakit.adapters.hira import HiRALayer
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.saving import adapter_bytes, export, save_adapter
from lorakit.adapters.sparsify import SparseLoRALayer
from lorakit.adapters.state import adapter_state, load_adapter_state, parameter_stats, requantisation_error
from lorakit.adapters.storage import load_adapter
from lorakit.adapters.switch import disabled
from lorakit.adapters.zeros import compact, sparsity_report
from lorakit.base.quantize import quantize_nf4
from lorakit.settings import AdapterSettings, SparseSettings
