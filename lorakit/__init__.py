"""lorakit: what does each method of parameter-efficient fine-tuning really cost, and what does it buy?"""

import json
import logging
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# When transformers imports it, bitsandbytes complains of an optional kernel that would have to be downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Module -> the public names it defines; imported on first use, so that `import lorakit` costs no more than a glance.
_NAMES = json.loads((Path(__file__).with_name("configs") / "public.json").read_text(encoding="utf-8"))
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names.split()}
_OPEN = "adapters analysis assets gates measure models records runs scratch sketches skip studies tasks tokens training"
_MODULES = {name: name for name in _OPEN.split()} | {"table": "analysis.tables"}
_MODULES |= {name: f"analysis.{name}" for name in ("figures", "gate_figures", "stats", "style")}

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"lorakit.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return import_module(f"lorakit.{_MODULES[name]}")
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
