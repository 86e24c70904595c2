"""Where the project keeps its parameters and results, wherever a notebook or a command is started from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import require
from lorakit.params import read_files
from lorakit.rows import method_of

PROJECT = Path(__file__).resolve().parents[1]
PARAMS = PROJECT / "params"
RESULTS = PROJECT / "results"


def params_of(setting: str, row: str) -> dict[str, Any]:
    """What `params/<setting>/` says for the file `<row>.yaml`, its setting file first.

    A file that names no method is about the method it is called after, or about LoRA.

    Raises:
        ParameterError: there is no such setting or method; the message lists those that exist.
    """
    settings = sorted(path.parent.name for path in PARAMS.glob("*/_setting.yaml"))
    require(setting in settings, "setting", setting, f"must be one of {', '.join(settings)}")
    rows = sorted(path.stem for path in (PARAMS / setting).glob("[!_]*.yaml"))
    require(row in rows, "method", row, f"{setting} has {', '.join(rows)}")
    files = [PARAMS / setting / "_setting.yaml", PARAMS / setting / f"{row}.yaml"]
    return {"setting": setting, "row": row} | method_of(row) | read_files(files)
