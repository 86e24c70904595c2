"""What a reader waits for: the planner's answer, the comparison's page; and what the records weigh."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._common import Claim, seconds
from lorakit.files import PROJECT

DESCRIPTION = (
    "`lorakit plan` of deep models and `20_compare` from committed records, whole processes; megabytes of records"
)
TARGET = "plan of Gemma 3 12B <= 5 s; the notebook <= 20 s; results/ <= 30 MB"

ROUNDS = 5
MODELS = ("google/gemma-3-12b-pt", "google/gemma-3-1b-pt")
PLAN, NOTEBOOK, RECORDS = 5.0, 20.0, 30.0  # seconds, seconds, MB


def run() -> list[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        read = ["run", str(PROJECT / "notebooks" / "20_compare.ipynb"), "--output", f"{folder}/compare.ipynb"]
        commands = {f"lorakit plan {model}": (["plan", model], PLAN) for model in MODELS}
        commands["20_compare from records"] = (read, NOTEBOOK)
        claims = [Claim(name, _median(argv), limit, 1.0, "s") for name, (argv, limit) in commands.items()]
    size = sum(path.stat().st_size for path in _committed())
    return [*claims, Claim("committed records", size / 1e6, RECORDS, 1.0, "MB")]


def _median(argv: list[str]) -> float:
    """Seconds of a command in a process of its own: the median of some, after one that fills the file cache."""

    def call() -> None:
        subprocess.run([sys.executable, "-m", "lorakit", *argv], check=True, capture_output=True)

    call()
    return statistics.median(seconds(call) for _ in range(ROUNDS))


def _committed() -> list[Path]:
    listed = subprocess.run(["git", "-C", PROJECT, "ls-files", "-z", "results"], check=True, capture_output=True)
    return [PROJECT / name for name in listed.stdout.decode().split("\0") if name]
