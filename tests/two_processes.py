"""Run a function of a test module in several processes that talk over gloo, and give back what each returned."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
WORKER = """
import sys, importlib, torch
sys.path[:0] = sys.argv[1].split(":")
torch.set_num_threads(1)
result = getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(sys.argv[4])
torch.save(result, sys.argv[5])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def run(module: str, function: str, folder: Path, timeout: float = 240, count: int = 2) -> list[Any]:
    """What `module.function(folder)` returned in each of `count` processes; it must be readable by torch.load."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "LORAKIT_PROGRESS": "none"}
        paths = ":".join(map(str, (FOLDER, FOLDER / "training")))
        command = [sys.executable, "-c", WORKER, paths, module, function, folder, folder / f"{function}-{rank}.pt"]
        options = {"env": os.environ | place, "cwd": FOLDER.parent, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([str(word) for word in command], **options))
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-3000:] for text in errors)
    return [torch.load(folder / f"{function}-{rank}.pt", weights_only=False) for rank in range(count)]
