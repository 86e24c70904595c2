"""Frames hold what records say, a line each; what cannot be compared is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from functools import reduce
from operator import getitem

import numpy as np
import pytest
from faults.mutations import places
from synthetic_records import diverged, gated, record, search

from lorakit import records as contract
from lorakit.analysis import names, report, tables
from lorakit.analysis.frame import ROWS, frame, require_comparable
from lorakit.errors import DataError, ParameterError


def test_a_line_a_run():
    runs = frame([record("lora", 2), gated("slora", 1, redundancy=0.8), diverged("full")]).runs
    assert runs["row"].to_list() == ["lora", "slora", "full"] and runs["seed"].to_list() == [2, 1, 0]
    assert runs["label"].to_list() == ["LoRA", "SLoRA", "full fine-tuning"]
    lora, slora, full = runs.to_dict("records")
    costs = [lora[name] for name in ("tokens", "latency_ms", "adapter_bytes", "nonzero")]
    assert costs == [30_360, 1.25, 1.5 * 2**20, 900]
    assert lora["test accuracy"] == 0.9 - 0.04 - 0.02 and lora["gate"] == "none" and np.isnan(lora["target_rate"])
    assert (slora["gate"], slora["target_rate"], slora["acceptance_rate"]) == ("novelty", 0.3, 0.3)
    asked = [slora[name] for name in ("model", "task", "learning_rate", "redundancy")]
    assert asked == ["a-model", "sst2", 1e-3, 0.8]
    assert full["status"] == "diverged" and np.isnan(full["validation loss"])
    assert all(runs[name].dtype == float for name in ("peak_memory_bytes", "trainable", "budget"))


def test_a_line_a_point():
    run = record("lora", points=2)
    curves = frame([run, diverged("full"), search()]).curves
    assert len(curves) == 3 + 5 and set(curves["row"]) == {"lora", "full"}
    mine = curves[curves["row"] == "lora"]
    assert mine["step"].to_list() == [0, 10, 20] and np.isnan(mine["train loss"][0])
    for metric in ("loss", "accuracy"):
        assert mine[f"validation {metric}"].to_list() == [point.validation[metric] for point in run.curve]
    assert np.isnan(curves["validation loss"].iloc[-1]) and curves["gate_score"].dtype == float


def test_a_line_a_kind_of_memory():
    run = record("lora")
    run.costs.peak_memory_bytes = 12
    memory = frame([run, record(costs=contract.Costs())]).memory
    predicted = memory[~memory["measured"]]
    assert dict(zip(predicted["kind"], predicted["bytes"], strict=True)) == run.costs.predicted_memory
    assert memory[memory["measured"]][["kind", "bytes"]].to_numpy().tolist() == [["peak", 12]]
    assert [len(table) for table in (frame([]).runs, frame([]).curves, frame([]).memory)] == [0, 0, 0]
    assert frame(frames := frame([run])) is frames and frames.runs is frames.runs and list(frames) == [run]  # made once


ODD = (None, True, -1, 10**400, " ", "8", ["a"], {"a": 1})


@pytest.mark.parametrize("part", ["resolved", "costs", "parameters", "latency", "adapter_bytes", "final", "environment",
                                  "fingerprints", "details", "curve"])  # fmt: skip
def test_whatever_stands_in_a_record_it_is_refused_by_file_and_key_or_makes_tables(tmp_path, part):
    path, other = tmp_path / "s0.json", gated("random", 1, logged=False, evaluations=1)
    whole = gated(logged=False, evaluations=1).model_dump()
    whole |= {name: record().model_dump()[name] for name in ("parameters", "latency", "adapter_bytes")}
    whole["environment"], whole["fingerprints"] = {"cpu": "c", "device": "d"}, {"model": "a", "data": {"b": "c"}}
    whole["resolved"] |= {"label": "x", "differs": {"rank": "so"}, "gating": None}
    for at in [(part, *more) for more in places(whole[part])] or [(part,)]:
        read = [other]
        for seed, bad in enumerate(ODD):
            changed = deepcopy(whole) | {"seed": seed}
            reduce(getitem, at[:-1], changed)[at[-1]] = bad
            path.write_text(json.dumps(changed))
            try:
                read.append(contract.read(path))
            except DataError as error:
                assert str(error).startswith(f"{path}: field {part}") and str(at[-1]) in str(error), error
                assert len(str(error).splitlines()) == 1
        made = frame(read)
        assert len(made.runs) == len(read) == len(made.curves)
        assert report.report(made, mixed=True) and str(tables.results_table(made, mixed=True))


@pytest.mark.parametrize(
    ("what", "change"),
    [("model", {"resolved": {"model": "a", "task": "sst2"}}), ("task", {"resolved": {"model": "b", "task": "mrpc"}}),
     ("data fingerprint", {"fingerprints": {"data": {"train.tsv": "f" * 64}}}),
     ("model fingerprint", {"fingerprints": {"model": "0" * 64}}),
     *((name, {"resolved": {"model": "b", "task": "sst2", name: 0}}) for name in ROWS)],
)  # fmt: skip
def test_runs_on_something_else_are_refused_unless_the_reader_insists(what, change):
    stated = {
        "resolved": {"model": "b", "task": "sst2"} | dict.fromkeys(ROWS, 64),
        "fingerprints": {"data": {"train.tsv": "e" * 64}, "model": "1"},
    }
    same = [record("lora", seed, **stated) for seed in (0, 1)]
    assert require_comparable([*same, record("full")]) == ""  # an old record that states nothing
    other = record("head", 4, **stated | change)
    with pytest.raises(ParameterError, match=f"lora seed 0: .*; head seed 4: .*must be of one {what}"):
        require_comparable([*same, other])
    assert require_comparable([*same, other], mixed=True) == f"not comparable: {what} differ"


def test_every_axis_is_a_field_of_a_point_and_known_rows_come_first():
    assert {axis.field for axis in contract.AXES.values()} <= set(contract.Point.model_fields)
    assert names.order(["zeta", "head", "alpha", "full", "lora", "lora"]) == ["full", "lora", "head", "alpha", "zeta"]
    assert names.label("lora") == "LoRA" and names.label("zeta") == "zeta"


def test_reading_needs_no_torch_and_the_front_door_no_pandas():
    code = "import sys, lorakit.cli, lorakit.params\nassert not {'pandas', 'scipy', 'torch'} & {*sys.modules}\n"
    code += "from lorakit.analysis import report, stats\nassert not {'torch', 'matplotlib'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
