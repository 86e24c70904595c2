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
from lorakit.gates import candidates
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
    if params.gate == "none" or candidates(params) > 1:  # of examples: a forward of each candidate as well
        return steps * (1 + candidates(params) * {"none": 0, "random": 0, "excess_loss": 1}.get(params.gate, 0.5))
    burn, rate = min(params.gate_burn_in, steps), params.gate_rate  # the first are all accepted
    return burn + (steps - burn) * (1 + rate) / 2 / (rate if params.budget_unit == "accepted_steps" else 1)


def throughput(timings: Sequence[Record], runs: Sequence[Record]) -> float:
    """FLOP/s of the machine that `lorakit time` ran on: the median over rows that have records of runs as well.

    Of each row its records' FLOPs a step over the step's median time. NaN: nothing was timed.
    """
    timed = {one.row: 1e-3 * one.details["timing"]["step"]["ms"][1] for one in timings}
    speeds = [run.costs.flops / run.costs.steps / timed[run.row] for run in runs if run.row in timed]
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
    speed = throughput(_read(setting, "timing"), done) if tflops is None else 1e12 * tflops
    require(speed > 0, "tflops", tflops, f"give it: no row of {setting} was timed")
    each = [cost(run.params, done, max(1, run.resources.gpus)) for run in asked]
    costs = pd.DataFrame(each, [run.method for run in asked], Cost._fields, float)
    open_ended = np.array([run.params.budget_unit != "flops" for run in asked])  # else the budget says it all
    shares = (costs["counted"] / costs["predicted"])[open_ended].dropna()
    share = shares.median() if len(shares) else 1.0
    flops = costs["counted"].fillna(costs["predicted"] * np.where(open_ended, share, 1.0))
    starred = costs["counted"].isna() & open_ended & flops.notna()
    run_hours = flops / speed / 3600
    searched, trained = costs["search"] * run_hours, seeds * run_hours
    total = (searched + trained).sum()
    least = np.nanmax([total / gpus, *(searched + run_hours) / costs["devices"]])  # one run after its search
    shown = {
        "row": costs.index,
        "TFLOPs a run": [f"{one / 1e12:.4g}{' *' * star}" for one, star in zip(flops, starred, strict=True)],
        "GiB a device": (costs["memory"] / GIB).map("{:.2f}".format),
        "device-hours of search": searched.map("{:.2f}".format),
        f"of runs, {seeds} each": trained.map("{:.2f}".format),
    }
    scaled = f", times {share:.2f} as those counted took" * bool(len(shares))
    return Table(
        pd.DataFrame(shown).replace("nan", NONE),
        f"{total:.1f} device-hours; on {gpus} at least {least:.1f} hours, at {speed / 1e12:.3g} TFLOP/s each",
        f"* predicted: rows of full length, nothing skipped{scaled}" * bool(starred.any()),
        f"not known before it ran, and left out: {', '.join(flops.index[flops.isna()])}" * bool(flops.isna().any()),
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
