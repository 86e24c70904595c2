"""lorakit: what does each method of parameter-efficient fine-tuning really cost, and what does it buy?"""

import logging
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# When transformers imports it, bitsandbytes complains of an optional kernel that would have to be downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Public name -> module that defines it; imported on first use, so that `import lorakit` costs no more than a glance.
_PUBLIC = {
    "attach": "adapters",
    "detach": "adapters",
    "merge": "adapters",
    "unmerge": "adapters",
    "adapter_state": "adapters",
    "load_adapter_state": "adapters",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "parameter_stats": "adapters",
    "adapter_bytes": "adapters",
    "quantize_nf4": "adapters",
    "requantisation_error": "adapters",
    "run": "runs.experiment",
    "search": "runs.search",
    "SLoRATrainer": "training",
    "FLoRATrainer": "training",
    "Gating": "settings",
    "HeadGradientGate": "gates",
    "Record": "records",
    "read": "records",
    "read_all": "records",
    "frame": "analysis.frame",
    "Params": "params",
    "collect": "params",
    "resolve": "params",
    "RESULTS": "files",
    "params_of": "params",
    "beside": "params",
    "shown": "params",
    "LorakitError": "errors",
    "ParameterError": "errors",
    "DataError": "errors",
    "AssetError": "errors",
    "CheckpointError": "errors",
}
_MODULES = (
    *("adapters", "analysis", "assets", "gates", "measure", "models", "records", "runs", "scratch", "sketches", "skip"),
    *("studies", "tasks", "tokens", "training"),
)
_MODULES = {name: name for name in _MODULES} | {
    **{name: f"analysis.{name}" for name in ("figures", "gate_figures", "stats", "style")},
    "table": "analysis.tables",
}

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"lorakit.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return import_module(f"lorakit.{_MODULES[name]}")
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
