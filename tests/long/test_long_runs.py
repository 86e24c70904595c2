"""Five thousand steps of a gate, of SkipLoRA and of FLoRA: memory and open files are those of the first thousand.

What checkpoints cost of a run's time is printed, not asserted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

STEPS, EVERY, WARM = 5000, 50, 1000
SLOPE = 0.3  # MiB per 1,000 steps
SETTING = {"lora": "toy", "slora": "toy", "skip": "toy", "flora": "toy-instruct"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
RUN = """
import gc, json, os, sys, time
import lorakit
from lorakit import params
from lorakit.training import BudgetTrainer

setting, row, steps, every, folder = sys.argv[1:]
step, save, seen, times, saving = BudgetTrainer.training_step, BudgetTrainer._save_checkpoint, {}, [], []

def watched(self, *given):
    taken = len(times)
    times.append(time.perf_counter())
    if taken % int(every) == 0:
        gc.collect()
        told = dict(line.split(":", 1) for line in open("/proc/self/status"))
        seen[taken] = int(told["RssAnon"].split()[0]) / 1024, len(os.listdir("/proc/self/fd"))
    return step(self, *given)

def saved(self, *given):
    began = time.perf_counter()
    save(self, *given)
    saving.append(time.perf_counter() - began)

BudgetTrainer.training_step, BudgetTrainer._save_checkpoint = watched, saved
given = params.params_of(setting, row) | {"budget": int(steps), "budget_unit": "steps", "run_dir": folder}
lorakit.run(given | {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "save_steps": 100})
print(json.dumps([list(seen), *zip(*seen.values()), sum(saving) / (times[-1] - times[0]), len(saving)]))
"""


@pytest.mark.parametrize(("row", "setting"), SETTING.items())
def test_memory_and_open_files_do_not_grow(tmp_path, row, setting):
    words = [setting, row, STEPS, EVERY, tmp_path / "run"]
    environment = os.environ | {"LORAKIT_PROGRESS": "none", "OMP_NUM_THREADS": "1"}
    out = subprocess.check_output([sys.executable, "-c", RUN, *map(str, words)], text=True, env=environment)
    steps, memory, files, share, saves = json.loads(out.splitlines()[-1])
    late = np.array(steps) >= WARM
    slope = np.polyfit(np.array(steps)[late], np.array(memory)[late], 1)[0] * 1000
    told = {"row": row, "MiB per 1,000 steps": slope, "MiB": [memory[0], *np.array(memory)[late][[0, -1]]]}
    print(
        json.dumps(told | {"open files": sorted(set(files)), "share of checkpoints": share, "of them": saves}),
        flush=True,
    )
    assert steps[-1] >= STEPS - EVERY and saves >= 1
    assert slope <= SLOPE and len(set(np.array(files)[late])) == 1, told
