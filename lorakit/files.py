"""Where the project keeps its files; what a file holds; and one is written whole or not at all: aside, then renamed."""

import contextlib
import glob
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorakit.errors import LorakitError, ParameterError, require

_AROUND, _PACKED = Path(__file__).resolve().parents[1], Path(__file__).with_name("project")
_PLACES = (Path.cwd(), *Path.cwd().parents, _AROUND)
_FOUND = [place for place in _PLACES if all((place / part).exists() for part in ("Snakefile", "params", "notebooks"))]
# the working folder one is in, or the clone around the package; else the folder one is in, for results alone
HOME = Path(os.environ.get("LORAKIT_HOME") or [*_FOUND, Path.cwd()][0]).resolve()
PROJECT = HOME if (HOME / "Snakefile").is_file() or not _PACKED.is_dir() else _PACKED  # what is read: params …
PARAMS = PROJECT / "params"
RESULTS = HOME / "results"
CONFIGS = Path(__file__).with_name("configs")  # what the package brings that is no code
MARK = ".lorakit-"  # in the name of a folder on its way, which is locked as long as its process lives
LOCK = ".lock"
# what safetensors and PyTorch say of a disk that is full, in exceptions of their own
UNWRITTEN = re.compile(r"serializing: I/O error|inline_container\.cc:\d+\] \. (unexpected pos|.*write failed)")


def clear_left(place: str | Path, name: str) -> None:
    """Remove folders of our own in `place` of this `name` that kills left."""
    for left in Path(place).glob(f"{glob.escape(name + MARK)}*"):
        with contextlib.suppress(OSError, Timeout):  # somebody else's, or still at work
            if (left / LOCK).is_file() and not left.is_symlink():
                with FileLock(left / LOCK, blocking=False):
                    _clear(left)
            left.rmdir()  # empty: killed before it was locked, or as it was removed


@contextmanager
def aside(place: str | Path, name: str) -> Iterator[Path]:
    """A folder of our own in `place`, gone at the end of the block; those of this `name` that kills left go first.

    Raises:
        OSError: the block wrote to a full disk, whatever its library made of that.
    """
    clear_left(place, name)
    held, folder = None, Path(place)
    while not (held and (folder / LOCK).is_file()):  # else another process took it for left, before it was locked
        held = None
        folder = Path(tempfile.mkdtemp(dir=place, prefix=name + MARK))
        with contextlib.suppress(FileNotFoundError, Timeout):
            held = FileLock(folder / LOCK).acquire(blocking=False)
    try:
        with held:
            yield folder
    except Exception as error:
        if isinstance(error, (OSError, LorakitError)) or not UNWRITTEN.search(str(error)):
            raise
        raise OSError(f"{place}: cannot be written, is the disk full? {error}") from None
    finally:
        with contextlib.suppress(OSError):
            _clear(folder)
            folder.rmdir()


def _clear(folder: Path) -> None:
    """Remove what is in a folder of our own, its lock last: without one it is empty, or somebody else's."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def alone(lock: Path, name: str, value: str, who: str) -> Iterator[int]:
    """Keep others out of what `lock` is for; it ends with the process, however that ends. Gives its file descriptor.

    Raises:
        ParameterError: of the parameter `name`: `who` is at work there.
    """
    try:
        with FileLock(lock, blocking=False) as held:
            try:
                yield held._context.lock_file_fd  # a child that is passed it keeps the lock as long as it lives
            except ParameterError:  # refused: nothing is left behind
                lock.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it is not empty
                    lock.parent.rmdir()
                raise
    except Timeout:
        raise ParameterError(name, value, f"{who} is at work there") from None


def require_place(path: str | Path, name: str = "path", folder: bool = False) -> None:
    """Refuse what `written` could not write to; nothing is left behind.

    Raises:
        ParameterError: called `name`: a folder, a device, a path under a file, a folder without leave to write, a name
            too long; with `folder`, a file.
    """
    try:
        real = Path(os.path.realpath(path))
        kind = real.is_dir() if folder else real.is_file()
        wanted = "is not a folder; name a folder" if folder else "is a folder or a device; name a plain file"
        require(kind or not real.exists(), name, str(path), wanted)
        there = next(above for above in ([real] if folder else []) + [*real.parents] if above.exists())
        require(there.is_dir(), name, str(path), f"is under {there}, which is a file")
        with aside(there, f".{real.name[:40]}") as probe:  # the whole name may be as long as a name can be
            tried = probe / real.relative_to(there)
            tried.parent.mkdir(parents=True, exist_ok=True)
            tried.touch()
    except (OSError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ParameterError(name, str(path), f"cannot be written: {reason}") from None


def require_empty(folder: Path, name: str) -> None:
    """Refuse a folder that holds something, saying what, and what `require_place` refuses."""
    require_place(folder, name, folder=True)
    there = sorted(path.name for path in folder.glob("*"))
    told = f"not empty, it holds {', '.join(there[:3])}{', …' * (len(there) > 3)}; name a new folder, or empty this one"
    require(not there, name, str(folder), told)


@contextmanager
def written(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """A temporary path, of the same name and ending, that takes the place of `path` at the end of the `with` block.

    The folder above is made where it is missing, a link is followed, and what was written has the modes that the umask
    says and is on the disk before it is renamed. If the block fails, nothing is left behind and `path` stays as it was.
    A folder (`folder=True`) is there to be filled; one that exists under `path` keeps what is not written anew, and
    gets its `.json` files last: who looks for them finds either none of the new files that matter or all.

    Raises:
        ParameterError: see `require_place`.
    """
    path = Path(path).expanduser()  # "~" is the user's folder, as a shell would have it
    require_place(path, folder=folder)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # a folder that exists may be a mount: above it is another file system, or nothing that can be written to
    with aside(path if folder and path.is_dir() else path.parent, f".{path.name[:40]}") as beside:
        temporary = beside / path.name
        if folder:
            temporary.mkdir()
        yield temporary
        settle(temporary)
        if folder and path.is_dir():
            for made in sorted(temporary.iterdir(), key=lambda made: made.suffix == ".json"):
                os.replace(made, path / made.name)
            _to_disk(path)
        else:
            os.replace(temporary, path)
        _to_disk(path.parent)


def settle(made: Path) -> None:
    """Give what was written the modes that the umask says, and wait until it is on the disk."""
    asked = made.parent / ".mode"
    asked.touch()
    mode = asked.stat().st_mode & 0o666
    asked.unlink()
    for path in (*made.rglob("*"), made):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)
        _to_disk(path)


def put_away(paths: Iterable[Path]) -> None:
    """Move what is there of `paths`, siblings, into a folder `earlier-N` beside them; the user may want it."""
    if there := [path for path in paths if path.exists()]:
        folder = next(f for n in itertools.count(1) if not (f := there[0].parent / f"earlier-{n}").exists())
        folder.mkdir()
        for path in there:
            os.replace(path, folder / path.name)
        _to_disk(folder.parent)


def _to_disk(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # folders, on a system that opens none
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_text(text: str, path: str | Path) -> Path:
    """Write `text` to `path`, whole or not at all; see `written`."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path).expanduser()


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
