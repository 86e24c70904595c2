"""`lorakit time SETTING`: what a training step and an answer of each row take, all rows taking turns in one process.

Seconds of whole runs compare poorly: they were other hours, with other work beside them. Here every row trains a step,
then every row the next one, and a slow moment falls on all; ratios are of steps side by side. The reference takes part
twice: how far its twin's ratio is from 1 is what noise makes of equal work.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lorakit import adapters, records
from lorakit.analysis.tables import Table, timing_table
from lorakit.errors import LorakitError, require
from lorakit.files import HOME, RESULTS, require_place
from lorakit.measure.latency import inference_latency
from lorakit.measure.lockstep import lockstep
from lorakit.records import Record
from lorakit.runs import sweep
from lorakit.runs.assembly import Assembled, assemble, build_trainer, fingerprints
from lorakit.runs.experiment import first_test_batch, new_record
from lorakit.training import Diverged

TWIN, WARM_UP = "twin", 3


def timed(runs: Mapping[str, sweep.Run], steps: int = 40, reference: str = "lora") -> list[Record]:
    """A record of kind "timing" for each of `runs` and for the reference's twin.

    `details["timing"]` holds quartiles, [lower, median, upper], of milliseconds and of ratios to the reference: "step"
    (of a batch that a gate may reject), "answer" (one test batch), "merged" (the same, adapters merged). "accepted", a
    ratio of means, is of seconds per accepted step; "padding" is its share in batches of the data in order.

    Args:
        runs: row -> its run; steps: timed of each, after a warm-up, of SkipLoRA's and of gates as well.

    Raises:
        ParameterError: no run of the reference, fewer than 3 steps; what a run's parameters can be refused for.
        LorakitError: training of a row ended before its last step.
    """
    require(reference in runs, "reference", reference, f"must be one of {', '.join(runs)}")
    require(steps >= 3, "steps", steps, "must be at least 3")
    asked = {row: run.params for row, run in (runs | {TWIN: runs[reference]}).items()}
    skipped = WARM_UP + steps // 5 + max(params.gate_burn_in * (params.gate != "none") for params in asked.values())
    changes = {"budget": float(skipped + steps + 1), "budget_unit": "steps", "evaluations": 1, "max_validation": 8}
    with tempfile.TemporaryDirectory() as folder:
        made, told, trainers = {}, {}, {}
        for row, params in asked.items():
            params = params.model_copy(update=changes)
            told[row] = new_record(params, {}).model_copy(update={"kind": "timing", "method": row, "status": "done"})
            made[row] = assemble(params)
            told[row].fingerprints = fingerprints(made[row])
            told[row].resolved["label"] *= row != TWIN  # which else would have the reference's name
            trainers[row] = build_trainer(made[row], told[row], f"{folder}/{row}")
        try:
            seconds = lockstep([*trainers.values()], skipped + steps + 1)
        except (Diverged, RuntimeError, MemoryError) as error:
            raise LorakitError(f"a row could not be timed: {' '.join(str(error).split())}") from error
        finally:
            for trainer in reversed(trainers.values()):  # the first holds the view that all share
                trainer.progress.close()
    for row, trainer in trainers.items():  # answers are given by what a run leaves, and without autocast
        if asked[row].sparsify == "structured":
            adapters.compact(made[row].model)
        trainer.accelerator.unwrap_model(made[row].model, keep_fp32_wrapper=False)
    kept = slice(skipped, skipped + steps)  # the last step evaluates
    steps_of = dict(zip(made, 1e3 * np.array(seconds)[:, kept], strict=True))
    logs = {row: trainer.gate_log.decisions[kept] for row, trainer in trainers.items() if trainer.gate.selective}
    accepted = {row: steps_of[row].sum() / (sum(logs.get(row, [True] * steps)) or np.nan) for row in made}
    for row, record in told.items():
        share = accepted[row] / accepted[reference]
        record.details["timing"] = {"steps": steps, "padding": _padding(made[row]), "accepted": share}
    for name, found in {"step": steps_of, **_answers(made, steps)}.items():
        for row, times in found.items():
            sizes = {"ms": times} | ({"ratio": times / found[reference]} if reference in found else {})
            quartiles = {what: np.percentile(sample, [25, 50, 75]).tolist() for what, sample in sizes.items()}
            told[row].details["timing"][name] = quartiles
    return [*told.values()]


def _answers(made: Mapping[str, Assembled], rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """Milliseconds of a test batch, (rounds,) for each row, in turns; "merged" only of what can be merged."""
    batches = {row: first_test_batch(assembled) for row, assembled in made.items()}

    def turns(rows: Sequence[str]) -> dict[str, np.ndarray]:
        for row in rows:
            inference_latency(made[row].model, batches[row], 1)
        taken = [[inference_latency(made[row].model, batches[row], 1, warmup=0) for row in rows] for _ in range(rounds)]
        return dict(zip(rows, np.array(taken).T, strict=True))

    beside = turns([*made])
    with contextlib.ExitStack() as merged:
        able = [row for row in made if adapters.can_merge(made[row].model)]
        for row in able:
            merged.enter_context(adapters.merged(made[row].model))
        return {"answer": beside, "merged": turns(able)}


def _padding(assembled: Assembled) -> float:
    """Of the training batches in the order of the data."""
    lengths = np.array([len(ids) for ids in assembled.task.train["input_ids"]])
    size = assembled.params.batch_size
    whole = lengths[: len(lengths) // size * size].reshape(-1, size)
    return float(1 - whole.sum() / (whole.max(1) * size).sum()) if whole.size else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Time a setting's rows and write results/SETTING/ROW/timing.json of each.

    Raises:
        LorakitError: an unknown setting or row, or a place that cannot be written to.
    """
    parser = argparse.ArgumentParser(prog="lorakit time", description="Seconds of steps and answers, rows in turns.")
    parser.add_argument("setting", help="a folder of params/")
    parser.add_argument("--rows", default="", help="separated by spaces (default: all of the setting)")
    parser.add_argument("--reference", default="lora", metavar="ROW", help="what the others are ratios to")
    parser.add_argument("--steps", type=int, default=40, help="timed of each row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each row's trainer (default: %(default)s)")
    parser.add_argument("--output", metavar="FOLDER", help="for ROW/timing.json (default: results/SETTING)")
    args = parser.parse_args(argv)
    runs = {run.method: run for run in sweep.plan(HOME, args.setting, args.rows)}
    output = Path(args.output or RESULTS / args.setting)
    require_place(output, "--output", folder=True)
    torch.set_num_threads(args.threads)  # several trainers' pools would spin against each other
    found = timed(runs, args.steps, args.reference)
    for record in found:
        records.write(record, output / record.row / "timing.json")
    print(Table(timing_table(found)))
    return 0
