"""Where the project keeps its files; and a file is written whole or not at all: under another name, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PARAMS = PROJECT / "params"
RESULTS = PROJECT / "results"


def write_text(text: str, path: str | Path) -> Path:
    """Write `text` to `path`, whose folder is made where it is missing; a failure leaves nothing behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
