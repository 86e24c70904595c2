"""`make matrix`: tests and notebooks with the oldest, the pinned and the newest of the libraries that decide most.

A column is an environment of its own under .venv-matrix/, kept for the next time; what it said is in build/matrix/.
What fails narrows a range in pyproject.toml. torch is TORCH in every column: another one is gigabytes with CUDA.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
VARIED = ("accelerate", "datasets", "peft", "transformers")
# what those ask for, and torch, which is asked for beside them
FOLLOW = ("dill", "fsspec", "huggingface-hub", "multiprocess", "pyarrow", "tokenizers", "torch")
COLUMNS = ("oldest", "pinned", "newest")


def requirements(column: str) -> list[str]:
    """What pip is asked for of the `VARIED`: the lower end of its range in pyproject.toml, its pin, or the range."""
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    ranges = [line for line in declared if re.split("[>=<]", line)[0] in VARIED]
    lowest = [re.sub(r">=(\d+\.\d+|\d+).*", r"==\1", line) for line in ranges]
    return [f"{line}.*" if "." in line else f"{line}.0.*" for line in lowest] if column == "oldest" else ranges


def pins(column: str) -> str:
    """constraints.txt without torch, which is asked for by its version, and without what differs in that column."""
    free = ("torch",) if column == "pinned" else (*VARIED, *FOLLOW)
    lines = (PROJECT / "constraints.txt").read_text("utf-8").splitlines()
    return "\n".join(line for line in lines if line.partition("==")[0] not in free) + "\n"


def build(column: str, torch: str, python: str) -> Path:
    """The environment's Python; made where it is not there, asked of pip again in any case."""
    folder = PROJECT / ".venv-matrix" / f"{column}-{torch}"
    found, held = folder / "bin" / "python", folder / "pins.txt"
    if not found.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    held.write_text(pins(column), "utf-8")
    pip = [found, "-m", "pip", "install", "-q", "-c", held]
    subprocess.run([*pip, "--upgrade", f"torch=={torch}", *requirements(column)], check=True)
    subprocess.run([*pip, "-e", f"{PROJECT}[dev]"], check=True)
    return found


def tried(python: Path, column: str, what: list[str]) -> tuple[bool, str]:
    """Run pytest, its output kept: whether it passed, and the last line."""
    log = PROJECT / "build" / "matrix" / f"{column}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    one = {"CI": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as out:
        command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", *what]
        ended = subprocess.run(command, cwd=PROJECT, env=os.environ | one, stdout=out, stderr=subprocess.STDOUT)
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return ended.returncode == 0, lines[-1].strip("= ") if lines else f"exit status {ended.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", default=" ".join(COLUMNS), help="separated by spaces")
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--tests", default="tests", help="files or folders, separated by spaces")
    parser.add_argument("--notebooks", default="notebooks", help="the same; empty: none")
    asked, failed = parser.parse_args(), False
    if unknown := {*asked.columns.split()} - {*COLUMNS}:
        parser.error(f"--columns: {', '.join(sorted(unknown))}: must be among {', '.join(COLUMNS)}")
    for column in asked.columns.split():
        python = build(column, asked.torch, asked.python)
        (PROJECT / "build" / "matrix" / f"{column}.log").unlink(missing_ok=True)
        versions = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {VARIED}), sep=', ')"
        print(f"{column}:", subprocess.run([python, "-c", versions], capture_output=True, text=True).stdout.strip())
        parts = {"tests": asked.tests.split(), "notebooks": asked.notebooks.split()}
        for part, what in parts.items():
            if what:
                # outputs differ by what the libraries print: only errors count
                lax = ["--nbval-lax", "--nbval-current-env"] * (part == "notebooks")
                passed, said = tried(python, column, [*lax, *what])
                failed |= not passed
                print(f"  {part}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
