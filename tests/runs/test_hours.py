"""A sweep on paper: its FLOPs against counted ones, its hours against `lorakit time`'s, and what is refused."""

from __future__ import annotations

import math
from statistics import mean

import pytest
from synthetic_records import record

from lorakit import records
from lorakit.cli import main
from lorakit.errors import ParameterError
from lorakit.files import PROJECT
from lorakit.params import resolve
from lorakit.records import Costs
from lorakit.runs import hours, sweep

SETTING = "sst2-minilm-compare"
RESULTS = PROJECT / "results" / SETTING
ROWS = (
    "full",
    "head",
    "hira",
    "lora",
    "lora_rank2",
    "sparse",
    "skip",
    "slora",
    "random",
)  # qlora's step of the timing was in bf16


def counted(row: str) -> list[records.Record]:
    return [found for found in records.read_all(RESULTS / row) if found.status == "done"]


def params_of(row: str):
    return sweep.Run(PROJECT, SETTING, row, 0).params


GATED = {"gate": "random", "gate_rate": 0.25, "gate_burn_in": 4}


@pytest.fixture(scope="module")
def costs():
    return {row: hours.cost(params_of(row), counted(row)) for row in ROWS}


def test_flops_that_were_never_counted_are_within_an_eighth_of_those_that_were(costs):
    shares = {row: found.counted / found.predicted for row, found in costs.items()}
    assert shares.pop("skip") < min(shares.values())  # what is skipped is not predicted
    for row, share in shares.items():
        assert share == pytest.approx(mean(other for name, other in shares.items() if name != row), rel=0.125), row
    assert 0.5 < shares["lora"] < 0.9  # rows shorter than the longest that the setting lets through


def test_hours_by_the_machine_s_throughput_are_within_a_fifth_of_what_was_timed(costs):
    read = [records.read_all(RESULTS, kind) for kind in ("timing", "run")]
    speed = hours.throughput(*read)
    for row, found in costs.items():
        [timing] = records.read_all(RESULTS / row, "timing")
        runs = counted(row)
        seconds = found.counted / mean(run.costs.steps for run in runs) / speed
        assert seconds == pytest.approx(timing.details["timing"]["step"]["ms"][1] / 1e3, rel=0.2), row


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"budget": 12, "budget_unit": "steps"}, 12), ({"budget": 12, "gradient_accumulation": 3}, 36),
     ({"budget": 4 * 32 * 10, "budget_unit": "tokens"}, 10), ({"budget": 12} | GATED, 4 + 20),
     ({"budget": 12, "budget_unit": "steps"} | GATED, 4 + 5), ({"budget": 3} | GATED, 3),
     ({"budget": 1, "budget_unit": "epochs"}, math.nan)],
)  # fmt: skip
def test_units_of_a_budget_are_steps(changes, steps):
    given = {"batch_size": 4, "max_length": 32, "budget_unit": "accepted_steps"}
    one = hours.cost(resolve(given | {"budget": 1}))
    found = hours.cost(resolve(given | changes))
    assert found.predicted == pytest.approx(steps * one.predicted, nan_ok=True)
    assert math.isnan(found.counted) and found.memory == one.memory


def test_a_budget_in_flops_is_what_a_run_takes_and_a_search_is_its_trials_share():
    given = {"budget": 3e9, "budget_unit": "flops", "search_rates": [1e-3, 2e-3, 4e-3], "search_budget": 1e9}
    found = hours.cost(resolve(given))
    assert found.predicted == 3e9 and found.search == pytest.approx(1.0)
    borrowed = given | {"row": "mine", "learning_rate_from": "results/toy/lora/lr_search.json"}
    assert hours.cost(resolve(borrowed)).search == 0


def test_a_step_that_cannot_be_predicted_is_not_and_several_devices_are_as_many_steps():
    unknown = hours.cost(resolve({"method": "peft", "peft_type": "DORA"}))
    assert math.isnan(unknown.predicted) and math.isnan(unknown.memory)
    assert hours.cost(resolve({}), devices=4).predicted == 4 * hours.cost(resolve({})).predicted
    tokens = [hours.cost(resolve({"budget": 1e5, "budget_unit": "tokens"}), devices=n).predicted for n in (1, 4)]
    assert tokens[0] == pytest.approx(tokens[1])


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Two rows of the toy setting, of which one ran: twice as the setting says, and once with another budget."""
    monkeypatch.setattr(hours, "RESULTS", tmp_path)
    plan = sweep.plan
    monkeypatch.setattr(sweep, "plan", lambda root, name: [r for r in plan(root, name) if r.method in ("lora", "head")])
    resolved = sweep.Run(PROJECT, "toy", "lora", 0).params.model_dump()
    for seed, flops, budget in ((0, 1e12, {}), (1, 3e12, {}), (2, 9e12, {"budget": 7.0})):
        made = record("lora", seed, setting="toy", costs=Costs(steps=10, flops=flops), resolved=resolved | budget)
        records.write(made, tmp_path / f"toy/lora/s{seed}.json")


def test_the_table_adds_up_and_says_what_is_predicted(toy, capsys):
    assert main(["plan", "--sweep=params/toy", "--seeds", "10", "--gpus", "2", "--tflops", "0.001"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert lines["lora"][1] == "2" and float(lines["lora"][-1]) == pytest.approx(10 * 2e12 / 1e9 / 3600, abs=0.01)
    assert lines["head"][2] == "*" and "as those counted took" in shown and "left out" not in shown
    parts = sum(float(cell) for row in ("lora", "head") for cell in lines[row][-2:])
    total, least = float(shown.split(" device-hours; on")[0].split()[-1]), shown.split("on 2 at least ")[1].split()[0]
    assert total == pytest.approx(parts, abs=0.1) and float(least) == pytest.approx(total / 2, abs=0.1)


def test_what_is_not_known_is_left_out_and_said(toy, monkeypatch):
    own = sweep.Run.params.fget
    changed = {"budget_unit": "epochs", "budget": 2.0, "search_budget": 1.0}
    change = lambda run: own(run).model_copy(update=changed if run.method == "head" else {})  # noqa: E731
    monkeypatch.setattr(sweep.Run, "params", property(change))
    shown = str(hours.hours("toy", tflops=1e-3))
    assert "left out: head" in shown and "nan" not in shown and "*" not in shown
    with pytest.raises(ParameterError, match="tflops=None: give it: no row of toy was timed"):
        hours.hours("toy")


@pytest.mark.parametrize(
    ("given", "says"),
    [({"seeds": 0}, "seeds=0: must be above 0"), ({"gpus": -1}, "gpus=-1"), ({"tflops": 0.0}, "tflops=0"),
     ({"tflops": math.nan}, "tflops"),
     ({"setting": "none-such"}, "SETTING='none-such': must be one of")],
)  # fmt: skip
def test_bad_input_is_named(given, says):
    with pytest.raises(ParameterError, match=says):
        hours.hours(**{"setting": "toy"} | given)
