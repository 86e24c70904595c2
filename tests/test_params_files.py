"""A row is the reference and one change: the rule, by every door, for every params file and for files that break it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorakit import params, records
from lorakit.errors import ParameterError
from lorakit.fields import APART, FREE, UNTRIED, flagged
from lorakit.files import PARAMS, PROJECT
from lorakit.params import Params, doors, files
from lorakit.params.whole import RATES
from lorakit.runs.search import best_rate

SETTINGS = sorted(path.parent.name for path in PARAMS.glob("*/_setting.yaml"))
ROWS = [(setting, path.stem) for setting in SETTINGS for path in sorted((PARAMS / setting).glob("[!_]*.yaml"))]
each_row = pytest.mark.parametrize(("setting", "row"), ROWS, ids=["/".join(row) for row in ROWS])
TOY_RATE = Params.model_fields["learning_rate"].default


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A params folder of our own, as the project's: setting s, whose reference is LoRA on another model than toy's."""
    monkeypatch.setattr(doors, "PARAMS", tmp_path)
    write(tmp_path, "s", _setting="model: m\ntask: t\nlearning_rate: 1.0e-3\nlearning_rate_from: a paper", lora="")
    return tmp_path


def write(root: Path, setting: str, **texts: str) -> None:
    (root / setting).mkdir(exist_ok=True)
    for name, text in texts.items():
        (root / setting / f"{name}.yaml").write_text(text + "\n")


def yaml_of(setting: str, row: str) -> dict:
    return yaml.safe_load((PARAMS / setting / f"{row}.yaml").read_text()) or {}


@each_row
def test_a_row_goes_together_and_a_rate_that_names_a_search_is_the_best_of_it(setting, row):
    run = params.resolve({"setting": setting, "row": row})
    assert (run.setting, run.row) == (setting, row) and run.label == yaml_of(setting, row).get("label", "")
    params.check(run)
    assert setting.startswith("toy") or run.learning_rate != TOY_RATE or "learning_rate" in yaml_of(setting, row)
    if run.learning_rate_from.endswith(".json"):
        record = records.read(PROJECT / run.learning_rate_from)
        assert record.kind == "lr_search" and best_rate(record) == run.learning_rate
        assert record.resolved["model"] == run.model
    assert (params.rate_note(run) is None) == (bool(run.learning_rate_from) or setting.startswith("toy"))


def test_the_two_kept_lists_are_flags_of_the_fields():
    told = {"compares", "combines", "differs", "label", "learning_rate_from"}  # what is only said of a run
    places = {"record", "run_dir", "data_files"}
    assert flagged(Params, APART) - told == {
        *places, "row", "resume", "report_to", "search_rates", "search_budget", "dataloader_num_workers",
    }  # fmt: skip
    assert flagged(Params, FREE) - told == {
        *places, "resume", "report_to", "latency_repeats", "predict_memory", "save_steps", "exact_match_rows",
        "forgetting", "search_rates", "search_budget", "max_test", "setting", "row", "dataloader_num_workers",
        "evaluate_first",
    }  # fmt: skip
    assert flagged(Params, UNTRIED) - told == {
        "search_rates", "learning_rate", "budget", "evaluations", "max_test", "latency_repeats", "predict_memory",
        "save_steps", "exact_match_rows", "forgetting", "resume", "report_to", "setting", "row",
        "dataloader_num_workers", "evaluate_first",
    }  # fmt: skip
    assert told <= flagged(Params, APART) & flagged(Params, FREE) & flagged(Params, UNTRIED)


BROKEN = [
    ("skip: prefix\nmodel: n", "model='n': in s/x.yaml: a row changes one question"), ("max_length: 32",
    "max_length=32: in s/x.yaml: a row changes one question"), ("batch_size: 4", "batch_size=4: in s/x.yaml"),
    ("budget: 12", "budget=12: in s/x.yaml: a row changes one question .*compares"), ("skip: prefix\nquantize: nf4",
    "quantize='nf4': in s/x.yaml"), ("rank: 4\ngating: {method: flora}", "gating=.*: in s/x.yaml"),
    ("compares: equal_steps\nskip: prefix", "skip='prefix': in s/x.yaml"), ("compares: equal_seeds",
    "compares='equal_seeds': "), ("dtype: bf16\ndiffers: {optimizer: why}",
    "differs=.*: in s/x.yaml: optimizer is not set beside"), ("differs: {dtype: 1}\ndtype: bf16",
    "differs=.*valid string"), ("combines: [lora, none]",
    "combines=.*: in s/x.yaml: 'none' is no other row of s, which has lora, x"), ("combines: [x]",
    "combines=.*'x' is no other row"), ("combines: [lora]\nskip: prefix", "skip='prefix': in s/x.yaml"), ("row: x",
    "row='x': in s/x.yaml: is a run's own"), ("seed: 3", "seed=3: in s/x.yaml: is a run's own"),
    ("learning_rate: 0.1\nlearning_rate_from: results/none.json", "learning_rate_from=.*: in s/x.yaml: no such record"),
    (f"learning_rate: 0.1\nlearning_rate_from: {'x' * 300}.json", "learning_rate_from=.*: in s/x.yaml: no such record"),
    ("learn_rate: 0.1", "learn_rate=0.1: in s/x.yaml: unknown parameter; did you mean 'learning_rate'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), BROKEN, ids=[text.replace("\n", ", ") for text, _ in BROKEN])
def test_a_row_that_breaks_the_rule_is_refused_by_every_door(place, text, says):
    write(place, "s", x=text)
    named = {"setting": "s", "row": "x"}
    doors = {params.params_of: ("s", "x"), params.resolve: (named,), params.collect: (named,)}
    for door, asked in (doors | {params.given: ([place / "s" / "x.yaml"], [])}).items():
        with pytest.raises(ParameterError, match=says) as caught:
            door(*asked)
        assert "\n" not in str(caught.value)


def test_a_file_called_after_a_method_changes_it_and_a_settings_file_has_no_runs_own(place):
    write(place, "s", hira="quantize: nf4")
    with pytest.raises(ParameterError, match=r"quantize='nf4': in s/hira.yaml"):
        params.params_of("s", "hira")
    write(place, "s", _setting="seed: 3")
    with pytest.raises(ParameterError, match=r"seed=3: in s/_setting.yaml: is a run's own"):
        params.params_of("s", "lora")


def test_what_a_row_may_do(place):
    write(
        place, "s", q="quantize: nf4\nlabel: Q\noptimizer: paged_adamw_8bit\ndiffers: {optimizer: paged}",
        skip="skip: prefix", both="combines: [q, skip]\nskip_share: 0.5",
        flops="compares: equal_flops\nbudget: 3.0e+9",
        own="rank: 4\nlearning_rate: 2.0e-3", named="rank: 4\nlearning_rate_from: another paper",
    )  # fmt: skip
    both = params.resolve({"setting": "s", "row": "both"})
    assert (both.quantize, both.optimizer, both.skip, both.skip_share) == ("nf4", "paged_adamw_8bit", "prefix", 0.5)
    assert (both.label, both.combines, both.learning_rate) == ("", ["q", "skip"], 1e-3)
    flops = params.resolve({"setting": "s", "row": "flops"})
    assert (flops.budget, flops.compares) == (3e9, "equal_flops")
    rates = {row: params.resolve({"setting": "s", "row": row}) for row in ("own", "named")}
    assert (rates["own"].learning_rate, rates["own"].learning_rate_from) == (2e-3, "")
    assert (rates["named"].learning_rate, rates["named"].learning_rate_from) == (1e-3, "another paper")
    assert params.rate_note(rates["own"]) == "learning rate not searched"


def test_what_is_given_wins_and_takes_its_rates_source_with_it(place):
    run = params.resolve({"setting": "s", "row": "lora", "learning_rate": 0.5, "gating": {"mode": "fractional"}})
    assert (run.learning_rate, run.learning_rate_from, run.gating.mode) == (0.5, "", "fractional")
    assert params.resolve({"setting": "s", "learning_rate": 1e-3}).learning_rate_from == "a paper"
    moved = params.resolve({"setting": "s", "model": "n"})
    assert (moved.learning_rate, moved.learning_rate_from) == (1e-3, "")  # that search was about another model
    assert params.complete(once := params.complete({"setting": "s", "row": "lora"})) == once


def test_a_row_that_a_setting_lacks_says_what_it_changes(place):
    with pytest.raises(ParameterError, match="row='slora': s has lora; another says what it changes"):
        params.resolve({"setting": "s", "row": "slora"})
    assert params.resolve({"setting": "s", "row": "mine", "rank": 4}).learning_rate == 1e-3


@pytest.mark.parametrize("method", RATES)
def test_who_brings_a_model_or_a_task_gets_the_methods_stated_rate(method):
    for given in ({"model": "gpt2"}, {"task": "mrpc"}, {"model": "gpt2", "task": "mrpc", "setting": "toy"}):
        given |= {"method": method}
        cell = {"setting": "toy", "row": "lora", "seed": 0} | given
        typed = [f"{name}={value}" for name, value in given.items()]
        runs = [params.resolve(asked) for asked in (given, params.collect(cell), params.given([], typed))]
        assert {run.learning_rate for run in runs} == {RATES[method][0]}
        assert {params.rate_note(run) for run in runs} == {"learning rate not searched"}
        assert params.resolve(given | {"learning_rate": 0.1}).learning_rate == 0.1
    toy = params.resolve({"method": method, "model": "toy-decoder", "task": "toy-instruct"})
    assert toy.learning_rate == TOY_RATE and params.rate_note(toy) is None


def test_files_of_two_settings_are_refused(place):
    write(place, "r", _setting="", lora="")
    with pytest.raises(ParameterError, match="is of another setting than s"):
        params.given([place / "s" / "_setting.yaml", place / "r" / "lora.yaml"], [])


def test_a_setting_elsewhere_takes_nothing_of_ours_with_its_name(tmp_path):
    write(tmp_path, "toy", _setting="rank: 2", head="dropout: 0.5\nmethod: head")
    run = params.resolve(params.given([tmp_path / "toy" / "head.yaml"], []))
    assert (run.setting, run.row, run.rank, run.dropout) == ("toy", "head", 2, 0.5)
    assert (run.learning_rate, run.learning_rate_from) == (TOY_RATE, "")  # not those of params/toy/head.yaml


@each_row
def test_params_files_say_only_what_differs(setting, row):
    folder = PARAMS / setting
    defaults = {name: info.get_default() for name, info in Params.model_fields.items()}
    said = files.read(folder / "_setting.yaml")
    said.pop(files.RESOURCES, None)
    assert {name for name, value in said.items() if defaults[name] == value} <= {"learning_rate"}  # must be named
    before = defaults | said | params.method_of(row)
    assert [name for name, value in yaml_of(setting, row).items() if before[name] == value] == []
