"""Where the project keeps its files; what a file holds; and one is written whole or not at all: aside, then renamed."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def project(package: Path) -> Path:
    """The folder around a checkout's `package`; of one installed elsewhere it is the folder one is in."""
    return package.parent if (package.parent / "Snakefile").is_file() else Path.cwd()


PROJECT = project(Path(__file__).resolve().parent)
PARAMS = PROJECT / "params"
RESULTS = PROJECT / "results"


@contextmanager
def written(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """A temporary path, of the same name and ending, that takes the place of `path` at the end of the `with` block.

    The folder above is made where it is missing, and what was written is readable by everyone. If the block fails,
    nothing is left behind and `path` stays as it was. A folder (`folder=True`) is there to be filled; one that exists
    under `path` keeps what is not written anew, and gets its `.json` files last: who looks for them finds either none
    of the new files that matter or all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a folder that exists may be a mount: above it is another file system, or nothing that can be written to
    where = path if folder and path.is_dir() else path.parent
    aside = Path(tempfile.mkdtemp(dir=where, prefix=f".{path.name}."))
    temporary = aside / path.name
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        for made in (temporary, *temporary.rglob("*")):
            made.chmod(0o755 if made.is_dir() else 0o644)
        if folder and path.is_dir():
            for made in sorted(temporary.iterdir(), key=lambda made: made.suffix == ".json"):
                os.replace(made, path / made.name)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(text: str, path: str | Path) -> Path:
    """Write `text` to `path`, whole or not at all; see `written`."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
