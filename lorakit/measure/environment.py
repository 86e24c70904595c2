"""Where a run took place: versions, processor, device, and a fingerprint of this code. No host, no user, no path."""

import functools
import hashlib
import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "numpy", "lorakit")

AROUND = ("notebooks", "fits", "plan", "sweep", "away")  # of `runs`: what starts, plans or reads runs
NOT_OF_A_RUN = ("analysis/", "studies/", "scratch/", "cli.py", "__main__.py", *(f"runs/{name}.py" for name in AROUND))


def environment() -> dict[str, object]:
    """Versions by package (None where it is not installed), what the run's numbers depend on, and SLURM's job."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "versions": {name: next((d.version for d in distributions(name=name)), None) for name in PACKAGES},
        **({"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}),  # names the run's log
        **checkout(Path(__file__).resolve().parents[2]),
    }


def checkout(folder: Path) -> dict[str, object]:
    """`commit` of the clone that `folder` is the root of, and whether its code or its params are other (`dirty`)."""
    git = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=True)
    try:
        root, commit = git(["git", "rev-parse", "--show-toplevel", "HEAD"]).stdout.split("\n")[:2]
        changed = git(["git", "--no-optional-locks", "status", "--porcelain", "--", "lorakit", "params"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "dirty": bool(changed)} if Path(root) == folder.resolve() else {}


def cpu_model() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def executed(root: Path) -> dict[str, Path]:
    """Name -> file of the package at `root`, of all that a run may execute: not what reads, plans or shows runs."""
    named = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return {name: named[name] for name in sorted(named) if not name.startswith(NOT_OF_A_RUN)}


@functools.cache
def code_fingerprint() -> str:
    """SHA-256 over the names and bytes of what a run may execute of lorakit, in order of the names.

    The same on every machine and in every checkout of the same code (line ends count as `\\n`).
    """
    digest = hashlib.sha256()
    for name, file in executed(Path(__file__).parents[1]).items():
        digest.update(name.encode() + b"\0")
        digest.update(file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()
