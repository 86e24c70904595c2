"""What a sweep will take, on paper: of each row FLOPs, memory of a device, hours of its search and of its runs.

FLOPs are those that were counted in the row's records, where there are any. Else they are predicted, of a step on rows
of full length, nothing skipped, a rejected batch as half a step; and where other rows of the setting were counted, that
is scaled by what those took of theirs: most rows are shorter. Hours are FLOPs by the device's throughput.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import pandas as pd

from lorakit import models, tasks
from lorakit.analysis.tables import NONE, Table
from lorakit.errors import require
from lorakit.files import HOME, PROJECT, RESULTS
from lorakit.params import Params
from lorakit.records import Record, read_all
from lorakit.runs import sweep
from lorakit.runs.plan import GIB, Plan, longest, predict


class Cost(NamedTuple):
    """Of a row: FLOPs of a run, predicted (NaN: not without its data) and counted (NaN: never ran), bytes at a step's
    peak, and how many runs' FLOPs its search takes."""

    predicted: float
    counted: float
    memory: int
    search: float


def cost(params: Params, records: Sequence[Record] = ()) -> Cost:
    """What a row costs; `records`: its finished runs."""
    named = ("model", "method", "precision", "quantize", "rank", "optimizer", "gradient_checkpointing", "loss")
    given = {name: getattr(params, name) for name in named} | {"targets": params.target_modules}
    given |= {"dtype": "bf16" if params.dtype == "bf16" else "fp32", "batch": params.batch_size}
    given |= {"kind": tasks.kind(params.task, models.family(params.model)), "mode": params.gating.mode}
    plan = Plan(**given, tokens=params.gating.topk_tokens if params.gating.selective else 1.0)
    step = predict(plan.but(seq=min(params.max_length, longest(plan))))
    rejected = 0 if params.gate == "none" else 1 / params.gate_rate - 1  # for each that is accepted
    batches = {"steps": 1, "accepted_steps": 1 + rejected / 2, "tokens": 1 / params.batch_size / step.seq}
    batches["steps"] = batches["accepted_steps"] / (1 + rejected)
    accumulated = 1 if params.budget_unit == "tokens" else params.gradient_accumulation
    each = 1 if params.budget_unit == "flops" else batches.get(params.budget_unit, math.nan) * accumulated * step.flops
    own = Path(params.learning_rate_from).parent.name in ("", params.row)
    trials = len(params.search_rates) * params.search_budget / params.budget if own else 0.0
    counted = mean([record.costs.flops for record in records] or [math.nan])
    return Cost(each * params.budget, counted, step.memory["peak"], trials)


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
    done = _read(setting)
    asked = {run.method: run.params for run in sweep.plan(HOME, setting)}
    costs = {row: cost(params, [run for run in done if run.row == row]) for row, params in asked.items()}
    known = [found for row, found in costs.items() if asked[row].budget_unit != "flops" and found.counted > 0]
    share = median([found.counted / found.predicted for found in known] or [1.0])
    speed = 3600 * (throughput(setting) if tflops is None else 1e12 * tflops)
    rows, total, least = [], 0.0, 0.0
    for row, found in costs.items():
        counted = found.counted > 0
        run = found.counted if counted else found.predicted * (1 if asked[row].budget_unit == "flops" else share)
        taken = (found.search * run / speed, seeds * run / speed)
        total, least = total + sum(taken), max(least, taken[0] + run / speed)
        told = [f"{run / 1e12:.4g}{'' if counted else ' *'}", f"{found.memory / GIB:.2f}", *map("{:.2f}".format, taken)]
        rows.append([row, *told])
    columns = ["row", "TFLOPs a run", "GiB a device", "hours of search", f"hours of runs, {seeds} each"]
    spread = f"on {gpus} at least {max(total / gpus, least):.1f}, at {speed / 3.6e15:.3g} TFLOP/s each"
    scaled = f" times {share:.2f}, as those counted took" if known else ""
    notes = f"* predicted, rows of full length and nothing skipped{scaled}" if len(known) < len(costs) else ""
    table = pd.DataFrame(rows, columns=columns).replace(["nan", "nan *"], NONE)
    return Table(table, f"{total:.1f} hours of one device; {spread}", notes)


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
