"""What an import costs: seconds of `import X` in a fresh interpreter, less the interpreter's own start."""

from __future__ import annotations

import subprocess
import sys

from benchmarks._common import Claim, interleave, time_claim

TARGET = 1.5


def claims(rounds: int = 7) -> list[Claim]:
    """`import lorakit`, and the first use of its adapters, each against `import torch`."""
    return [
        time_claim(statement, interleave(_run(statement), _run("import torch"), rounds, warmup=1), TARGET)
        for statement in ("import lorakit", "from lorakit import attach")
    ]


def _run(statement: str):
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True)
