"""A file is written whole or not at all: under another name first, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text(text: str, path: str | Path) -> Path:
    """Write `text` to `path` as UTF-8."""
    return write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: str | Path) -> Path:
    """Write `content` to `path`, whose folder is made where it is missing; a failure leaves nothing behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
