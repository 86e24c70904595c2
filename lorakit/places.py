"""Where the project keeps its parameters and results, wherever a notebook or a command is started from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import require
from lorakit.params import read_files

PROJECT = Path(__file__).resolve().parents[1]
PARAMS = PROJECT / "params"
RESULTS = PROJECT / "results"


def params_of(setting: str, method: str) -> dict[str, Any]:
    """What `params/<setting>/` says for `method`, its setting file first.

    Raises:
        ParameterError: there is no such setting or method; the message lists those that exist.
    """
    settings = sorted(path.name for path in PARAMS.glob("*") if path.is_dir())
    require(setting in settings, "setting", setting, f"must be one of {', '.join(settings)}")
    methods = sorted(path.stem for path in (PARAMS / setting).glob("[!_]*.yaml"))
    require(method in methods, "method", method, f"{setting} has {', '.join(methods)}")
    files = [PARAMS / setting / "_setting.yaml", PARAMS / setting / f"{method}.yaml"]
    return {"setting": setting, "method": method} | read_files(files)
