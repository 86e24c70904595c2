"""What a sweep will take, on paper: of each row FLOPs, memory of a device, hours of its search and of its runs.

FLOPs are those that were counted in the row's records, where there are any. Else they are predicted, of a step on rows
of full length, nothing skipped, a rejected batch as half a step; and where other rows of the setting were counted, that
is scaled by what those took of theirs: most rows are shorter. Hours are FLOPs by the device's throughput.
"""

import argparse
import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorakit import models, tasks
from lorakit.analysis.tables import NONE, Table
from lorakit.errors import ParameterError, require
from lorakit.files import HOME, PROJECT, RESULTS
from lorakit.params import Params
from lorakit.records import Record, read_all
from lorakit.runs import sweep
from lorakit.runs.plan import GIB, Plan, longest, predict

MADE_ALIKE = ("model", "batch_size", "max_length", "gradient_accumulation", "budget", "budget_unit")


class Cost(NamedTuple):
    """Of a row: FLOPs of a run, predicted and counted (NaN: not known), bytes that a device must have (NaN: a step that
    cannot be predicted), how many runs' FLOPs its search takes, and the devices of one run."""

    predicted: float
    counted: float
    memory: float
    search: float
    devices: int


def cost(params: Params, records: Sequence[Record] = (), devices: int = 1) -> Cost:
    """What a row costs; `records`: finished runs, of which those of this row and budget count."""
    named = ("model", "method", "precision", "quantize", "rank", "optimizer", "gradient_checkpointing", "loss")
    given = {name: getattr(params, name) for name in named} | {"targets": params.target_modules}
    given |= {"dtype": "bf16" if params.dtype == "bf16" else "fp32", "batch": params.batch_size}
    given |= {"kind": tasks.kind(params.task, models.family(params.model)), "mode": params.gating.mode}
    given |= {"tokens": params.gating.topk_tokens if params.gating.selective else 1.0}
    predicted, memory = math.nan, math.nan
    with contextlib.suppress(ParameterError):  # a method of PEFT's, an optimizer whose state is not known
        plan = Plan(**given)
        step = predict(plan.but(seq=min(params.max_length, longest(plan))))
        each, memory = step.flops * params.gradient_accumulation * devices, step.need
        predicted = each * _steps(params, params.gradient_accumulation * devices * params.batch_size * step.seq)
    if params.budget_unit == "flops":
        predicted = params.budget
    own = Path(params.learning_rate_from).parts[-3:-1] in ((), (params.setting, params.row))
    trials = len(params.search_rates) * params.search_budget / params.budget if own else 0.0
    alike = {name: getattr(params, name) for name in MADE_ALIKE}
    mine = [run.costs.flops for run in records if run.row == params.row and alike.items() <= run.resolved.items()]
    return Cost(predicted, mean(mine or [math.nan]), memory, trials, devices)


def _steps(params: Params, tokens: int) -> float:
    """What a run's budget comes to in whole optimizer steps of `tokens`; NaN: it depends on its data, or its clock."""
    counted = {"tokens": params.budget / tokens, "steps": params.budget, "accepted_steps": params.budget}
    steps = counted.get(params.budget_unit, math.nan)
    if params.gate == "none":
        return steps
    burn, rate = min(params.gate_burn_in, steps), params.gate_rate  # the first are all accepted
    return burn + (steps - burn) * (1 + rate) / 2 / (rate if params.budget_unit == "accepted_steps" else 1)


def throughput(setting: str) -> float:
    """FLOP/s of the machine that `lorakit time` timed the setting on: the median over rows that have records as well.

    Of each row its records' FLOPs a step over the step's median time. NaN: nothing was timed.
    """
    timed = {one.row: 1e-3 * one.details["timing"]["step"]["ms"][1] for one in _read(setting, "timing")}
    speeds = [run.costs.flops / run.costs.steps / timed[run.row] for run in _read(setting) if run.row in timed]
    return median(speeds or [math.nan])


def _read(setting: str, kind: str = "run") -> list[Record]:
    there = any((folder / setting).exists() for folder in (RESULTS, PROJECT / "results"))
    return [record for record in read_all(RESULTS / setting, kind) if record.status == "done"] if there else []


def hours(setting: str, seeds: int = 1, gpus: int = 1, tflops: float | None = None) -> Table:
    """The table of a setting's rows, and what they take together.

    Args:
        seeds: runs of each row; gpus: devices, a run on each at a time; tflops: 10**12 FLOP/s that one reaches in
            training (default: `throughput`).

    Raises:
        ParameterError: an unknown setting, a number that is not above 0.
    """
    for name, number in {"seeds": seeds, "gpus": gpus, "tflops": tflops}.items():
        require(number is None or 0 < number < math.inf, name, number, "must be above 0")
    done, asked = _read(setting), sweep.plan(HOME, setting)
    speed = throughput(setting) if tflops is None else 1e12 * tflops
    require(speed > 0, "tflops", tflops, f"give it: no row of {setting} was timed")
    costs = {run.method: cost(run.params, done, max(1, run.resources.gpus)) for run in asked}
    free = {run.method for run in asked if run.params.budget_unit != "flops"}  # where a budget in FLOPs says it all
    known = [costs[row].counted / costs[row].predicted for row in free]
    share = median([part for part in known if part > 0] or [1.0])
    rows, taken, starred = [], [], False
    for row, found in costs.items():
        counted, star = found.counted > 0, ""
        run = found.counted if counted else found.predicted * (share if row in free else 1)
        if not counted and row in free and run > 0:
            starred, star = True, " *"
        spent = [found.search * run / speed / 3600, seeds * run / speed / 3600]
        taken.append([*spent, (spent[0] + spent[1] / seeds) / found.devices])
        told = [f"{run / 1e12:.4g}{star}", f"{found.memory / GIB:.2f}", *map("{:.2f}".format, spent)]
        rows.append([row, *(NONE if cell == "nan" else cell for cell in told)])
    columns = ["row", "TFLOPs a run", "GiB a device", "device-hours of search", f"of runs, {seeds} each"]
    search, runs, longest_one = (np.array(taken).T[part] for part in range(3))
    total = np.nansum(search + runs)
    least = max(total / gpus, np.nanmax([*longest_one, 0]))
    unknown = [row for row, hours_of_it in zip(costs, runs, strict=True) if math.isnan(hours_of_it)]
    scaled = f", times {share:.2f} as those counted took" if any(part > 0 for part in known) else ""
    return Table(
        pd.DataFrame(rows, columns=columns),
        f"{total:.1f} device-hours; on {gpus} at least {least:.1f} hours, at {speed / 1e12:.3g} TFLOP/s each",
        f"* predicted: rows of full length, nothing skipped{scaled}" * starred,
        f"not known before it ran, and left out: {', '.join(unknown)}" * bool(unknown),
    )


def main(argv: Sequence[str]) -> int:
    """`lorakit plan --sweep SETTING`."""
    parser = argparse.ArgumentParser(prog="lorakit plan", description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", metavar="SETTING", required=True, help="a folder of params/")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="devices, a run on each (default: %(default)s)")
    parser.add_argument("--tflops", type=float, help="10**12 FLOP/s of a device in training (default: as timed here)")
    asked = parser.parse_args(argv)
    print(hours(Path(asked.sweep).name, asked.seeds, asked.gpus, asked.tflops))
    return 0
