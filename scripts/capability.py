"""What each row of the comparison can do, asked of the code: every cell is tried, on the toy models.

    python scripts/capability.py                       # every column, into benchmarks/measured/capability.json
    python scripts/capability.py --only merge,export   # these columns; the others stay as they are

Where a row serves both toy models, a number is the worse of the two.

A cell is `{"can": true, "measured": number or null, "unit": …}` where it was done and what came out compared,
`{"can": false, "why": …}` where the package refused, in its own words, and `{"can": null, "why": …}` where there is
nothing to try, or this machine cannot. Any other error, and logits that differ by more than rounding, are faults: they
end the command, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from toy_runs import (
    BOTH,
    ROWS,
    Trained,
    apart,
    base_of,
    difference,
    digest,
    outputs,
    params_of,
    require,
    runs_of,
    train,
    trained,
    tried,
)

from lorakit import adapters
from lorakit.adapters.saving import OWN_CONFIG_FILE
from lorakit.base.nf4 import is_four_bit
from lorakit.errors import LorakitError
from lorakit.files import PROJECT, write_text
from lorakit.measure.environment import code_fingerprint, environment
from lorakit.models.loading import KINDS
from lorakit.params import Params
from lorakit.quiet import quiet

# not under results/: there every .json is a record, and `lorakit claims` reads them all
FILE = PROJECT / "benchmarks" / "measured" / "capability.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
DIFFERENCE = "of the largest logit"
UPPER = r".*layers?\.[23]\..*(lin\d?|proj)"  # the layers of the second half of the toy models' blocks


class NotTried(Exception):
    """There is nothing to try, or this machine cannot; why."""


# --- the columns: each tries one thing with a row, in an empty folder, and gives back what it measured ---------------
def trains(place: str) -> Callable[[str, Path], None]:
    return lambda row, folder: trained(row, place) and None


def merge(row: str, folder: Path) -> float:
    found = []
    for run in runs_of(row):
        if not adapters.adapter_layers(run.model):
            raise NotTried(f"not applicable: {run.model.lorakit_attachment.merge_obstacle(run.model)}")
        plain = outputs(run.model, run)
        with adapters.merged(run.model):
            found.append(apart(outputs(run.model, run), plain, run))
    return max(found)


def merge_4bit(row: str, folder: Path) -> float:
    found = []
    for run in runs_of(row):
        if not any(map(is_four_bit, run.model.modules())):
            raise NotTried("not applicable: its base is not in 4 bits")
        packed = adapters.quantize_nf4(opened(run, folder), double_quant=run.params.double_quant)
        found.append(float(outputs(packed, run).loss - outputs(run.model, run).loss))
    return max(found)


def export(row: str, folder: Path) -> float:
    return max(difference(opened(run, folder), run) for run in runs_of(row))


def opened(run: Trained, folder: Path) -> torch.nn.Module:
    """The exported model, as Transformers opens it."""
    import transformers

    auto, place = getattr(transformers, f"AutoModelFor{KINDS[run.task.kind]}"), folder / run.params.model
    model, told = auto.from_pretrained(adapters.export(run.model, place), output_loading_info=True)
    require(not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), f"exported: {told}")
    return model


def peft(row: str, folder: Path) -> float:
    from peft import PeftModel

    found = []
    for run in runs_of(row):
        ours, theirs = (folder / f"{run.params.model}-{whose}" for whose in ("ours", "theirs"))
        if (adapters.save_adapter(run.model, ours) / OWN_CONFIG_FILE).is_file():
            raise NotTried(f"not applicable: no adapter; what was trained is kept with lorakit's own {OWN_CONFIG_FILE}")
        wrapped = PeftModel.from_pretrained(base_of(run), ours)
        found.append(difference(wrapped, run))
        wrapped.save_pretrained(theirs)
        back = adapters.load_adapter(base_of(run), theirs)
        require(not back.lorakit_attachment.foreign, f"{row}: PEFT's file was opened by PEFT")
        found.append(difference(back, run))
    return max(found)


def processes(row: str, folder: Path) -> None:
    for place, (first, second) in in_two()[row].items():
        require(first == second, f"{row}, {place}: two processes, two ends: {first}, {second}")
    refused = [first["refused"] for first, _ in in_two()[row].values() if "refused" in first]
    if len(refused) == len(in_two()[row]):
        raise LorakitError(refused[0])


@cache
def in_two() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """How every row ended in two processes: row -> place -> what each process says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        told = {"OMP_NUM_THREADS": "1", "LORAKIT_PROGRESS": "none", "LORAKIT_TIMEOUT": "300"}
        subprocess.run([*command, __file__, "--process", folder], env=os.environ | told, check=True)
        sides = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
    return {row: {place: [side[row][place] for side in sides] for place in sides[0][row]} for row in ROWS}


def process(folder: str) -> None:
    """One of the two."""
    ends: dict[str, dict[str, dict[str, Any]]] = {}
    for row in ROWS:
        for place in BOTH:
            run = tried(row, place)
            refused = isinstance(run, LorakitError)
            require(refused or run.processes == 2, f"{row}: not two processes")
            ends.setdefault(row, {})[place] = {"refused": str(run)} if refused else {"weights": digest(run.model)}
    write_text(json.dumps(ends), Path(folder) / f"{os.environ['RANK']}.json")
    torch.distributed.destroy_process_group()


def resume(row: str, folder: Path) -> None:
    for run in runs_of(row):
        params = run.params.model_copy(update={"run_dir": str(folder / run.params.model), "save_steps": 2})
        require(train(params, stop=3) is None, f"{row}: was not stopped")
        again = train(params)
        require("resumed at step 2" in again.notes, f"{row}: was not resumed")
        curves = [[point.model_dump(exclude={"seconds"}) for point in each.curve] for each in (run, again)]
        require(curves[0] == curves[1], f"{row}, {params.model}: the resumed curve is another")
        require(digest(run.model) == digest(again.model), f"{row}, {params.model}: the resumed weights are others")


def compiled(row: str, folder: Path) -> float:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise NotTried(f"not tried: {' '.join(str(error).split())}") from None
    found = []
    for run in runs_of(row):
        torch._dynamo.reset()
        found.append(difference(torch.compile(run.model, fullgraph=True), run))
    return max(found)


def kept_prefix(row: str, folder: Path) -> float:
    """Of a few rows that come three times, those on the last blocks' layers; a skipped prefix has its own end."""
    skips = params_of(row, "encoder").skip != "none"
    where = {"skip_share": 0.5, "skip_explore": 0, "dropout": 0} if skips else {"target_modules": UPPER}

    def apart_at(place: str) -> float:
        changed = where | {"base_dropout": False, "max_train": 16}
        plain, kept = (train(params_of(row, place, **changed, prefix_cache=to)) for to in ("none", "memory"))
        return difference(kept.model, plain)

    return max(where_served(apart_at))


def best_examples(row: str, folder: Path) -> None:
    own = params_of(row, "encoder").gate
    gate = {"gate": "loss_floor" if own == "none" else own, "gate_level": "example", "gate_candidates": 2}
    gate |= {"gate_burn_in": Params().gate_burn_in}  # which examples do not have
    where_served(lambda place: train(params_of(row, place, **gate)))


def where_served(attempt: Callable[[str], Any]) -> list[Any]:
    """What came of trying it on both models, as far as it is served there.

    Raises:
        LorakitError: the last refusal, where neither serves it.
    """
    found, refused = [], []
    for place in BOTH:
        try:
            found.append(attempt(place))
        except LorakitError as error:
            refused.append(error)
    if not found:
        raise refused[-1]
    return found


class Column(NamedTuple):
    """What is tried, in words, how, and the unit of what that measures."""

    asks: str
    ask: Callable[[str, Path], float | None]
    unit: str = ""


COLUMNS = {
    "encoder": Column("trains toy-encoder on toy-reviews (classification)", trains("encoder")),
    "masked": Column("trains toy-encoder on toy-stories (masked words)", trains("masked")),
    "decoder": Column("trains toy-decoder on toy-instruct (chat)", trains("decoder")),
    "merge": Column("merged, the logits are the same", merge, DIFFERENCE),
    "merge_4bit": Column("merged and packed in NF4 again: the rise in validation loss", merge_4bit, "nats"),
    "export": Column("lorakit.export: Transformers opens a plain model with the same logits", export, DIFFERENCE),
    "peft": Column("PEFT opens its file, and lorakit the one PEFT saves then; same logits", peft, DIFFERENCE),
    "processes": Column("two processes on the CPU end with the same weights, bit for bit", processes),
    "resume": Column("stopped, then resumed at a checkpoint: the same curve and weights, bit for bit", resume),
    "prefix_cache": Column("second half adapted, the first kept (prefix_cache): same logits", kept_prefix, DIFFERENCE),
    "examples": Column("trains the better half of each batch's examples (gate_level)", best_examples),
    "compile": Column("torch.compile makes one graph of its forward; same logits", compiled, DIFFERENCE),
}


def cell(row: str, name: str) -> dict[str, Any]:
    """What came of trying a column with a row."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            measured = COLUMNS[name].ask(row, Path(folder))
        except LorakitError as error:
            return {"can": False, "why": str(error).replace(folder, "FOLDER")}
        except NotTried as why:
            return {"can": None, "why": str(why)}
    return {"can": True, "measured": None if measured is None else float(f"{measured:.1e}"), "unit": COLUMNS[name].unit}


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", type=lambda text: text.split(","), metavar="COLUMN,…", help=", ".join(COLUMNS))
    options.add_argument("--output", type=Path, default=FILE, metavar="FILE")
    options.add_argument("--process", metavar="FOLDER", help=argparse.SUPPRESS)
    asked = options.parse_args(argv)
    if asked.process:
        return process(asked.process)
    kept: dict[str, Any] = {"columns": {}, "rows": {}}
    if asked.only:
        if unknown := {*asked.only} - {*COLUMNS}:
            options.error(f"--only: {', '.join(sorted(unknown))}: must be of {', '.join(COLUMNS)}")
        kept = json.loads(asked.output.read_text()) if asked.output.is_file() else kept
        left = [name for name in COLUMNS if name not in asked.only]
        if not all({*left} <= kept["rows"].get(row, {}).keys() for row in ROWS):
            options.error(f"--only: {asked.output.name} lacks rows or columns: make it whole first")
    versions = {name: environment()["versions"][name] for name in PACKAGES}
    for name in asked.only or COLUMNS:
        for row in ROWS:
            with quiet():
                found = kept["rows"].setdefault(row, {})[name] = cell(row, name)
            print(f"{name:10} {row:16} {found['can']!s:5} {found.get('measured', found.get('why'))}", flush=True)
        kept["columns"][name] = {"asks": COLUMNS[name].asks, "code": code_fingerprint(), "versions": versions}
    columns = {name: kept["columns"][name] for name in COLUMNS}
    rows = {row: {name: kept["rows"][row][name] for name in COLUMNS} for row in ROWS}
    made = {"made_by": "python scripts/capability.py", "columns": columns, "rows": rows}
    write_text(json.dumps(made, indent=1) + "\n", asked.output)
    return None


if __name__ == "__main__":
    main()
