"""What a process does to its files, counted, and what may happen to it at one of these events."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
RENAMES = ("os.rename", "os.link", "os.symlink", "os.mkdir")
EVENTS = ("open", *RENAMES, "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


class Events:
    """Counts what this process does to the files of `place`, and calls `at` at number `stop`.

    What is not written by Python itself (tensors) is seen by what comes before and after it.
    """

    def __init__(self, place: Path, stop: int, at: Callable[[Path, dict], None]):
        self.place, self.stop, self.at = place, stop, at
        self.count, self.synced, self.began = 0, {}, time.time_ns()
        self.fsync, os.fsync = os.fsync, self.flushed
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in EVENTS or (event == "open" and not (arguments[2] or 0) & WRITES):
            return
        path = arguments[0]
        if self.at is full and event not in ("open", "os.mkdir", "os.rename"):  # what frees room always works
            return
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(self.place)):
            self.happened()

    def flushed(self, file: int) -> None:
        self.happened()
        self.fsync(file)
        state = os.fstat(file)
        self.synced[state.st_ino] = state.st_mtime_ns

    def happened(self) -> None:
        self.count += 1
        if self.count == self.stop:
            self.at(self.place, self.synced, self.began)


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def term(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def power(place: Path, synced: dict[int, int], began: int) -> None:
    """Of a file that was never waited for, half may be on the disk when the power goes."""
    for path in (place / "run").rglob("*"):
        if path.is_file() and not path.is_symlink():
            state = path.stat()
            if state.st_mtime_ns > began and synced.get(state.st_ino) != state.st_mtime_ns:
                os.truncate(path, state.st_size // 2)
    kill()


AT = {"kill": kill, "term": term, "power": power, "full": full}
