"""Parameters: the defaults hold, and each mistake is one error that names the parameter, the value, what is allowed."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from lorakit import cli, params
from lorakit.errors import LorakitError, ParameterError
from lorakit.params import Params, beside, complete
from lorakit.params.whole import GROUPS, RATES
from lorakit.records import AXES
from lorakit.settings import AdapterSettings, Gating


def test_the_defaults_are_the_toy_run_pass_their_own_check_and_survive_yaml():
    defaults = Params()
    toy = ("toy", "lora", "toy-encoder", "toy-reviews")
    assert (defaults.setting, defaults.method, defaults.model, defaults.task) == toy
    for given in ({}, values := defaults.model_dump(), yaml.safe_load(yaml.safe_dump(values))):
        assert params.resolve(given) == defaults


BAD = {
    "rank": [0, -1, 1.5, "8", True, None, 10**30], "alpha": [0.0, -1.0, "16", float("inf"), 1e308],
    "dropout": [-0.1, 1.0, "0.1"],
    "learning_rate": [0.0, -1e-3, "1e-4", float("inf"), 1e308], "budget": [0, -0.5, "many", float("inf")],
    "budget_unit": ["epoch", "step", 1], "batch_size": [0, 2.0], "gradient_accumulation": [0],
    "seed": [-1, "0", 0.0, 2**32],
    "max_length": [1, 0], "max_train": [-1], "warmup": [-0.1, 1.0], "weight_decay": [-1.0], "max_grad_norm": [0.0],
    "evaluations": [0], "eval_batch_size": [0], "save_steps": [-1], "latency_repeats": [-1], "exact_match_rows": [-1],
    "search_budget": [0], "search_rates": [["1e-4"], [0.1, 0.0], [-1.0], 0.1, None], "init": ["zeros"],
    "schedule": ["step"], "precision": ["fp8", 16], "dtype": ["fp16"], "attention": ["flash"], "select": ["test"],
    "gate_rate": [1.0], "gate_beta": [0.0], "gate_ema": [2.0], "redundancy": [1.0],
    "gating": [0.3, "flora", ["flora"], None],
    "rslora": [1, "true"], "resume": ["yes"], "packing": [0], "model": [1, None], "target_modules": [3, [1], None],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_names_parameter_and_value(name, value):
    with pytest.raises(ParameterError) as caught:
        params.resolve({name: value})
    assert caught.value.name == name and caught.value.value == value
    assert str(caught.value).startswith(f"{name}={value!r}: ") and caught.value.allowed
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "allowed"),
    [({"rank": 0}, "greater than or equal to 1"), ({"dropout": 1.0}, "less than 1"),
     ({"budget_unit": "epoch"}, "'accepted_steps', 'epochs', 'steps', 'tokens', 'flops' or 'seconds'"),
     ({"init": "zeros"}, "'kaiming' or 'gaussian'")],
)  # fmt: skip
def test_the_error_says_what_is_allowed(given, allowed):
    with pytest.raises(ParameterError, match=allowed):
        params.resolve(given)


def test_an_error_is_one_line_however_long_the_value():
    for name, value in (("init", "x" * 5000), ("y" * 5000, 1), ("model", ["a\nb"] * 999)):
        with pytest.raises(ParameterError) as caught:
            params.resolve({name: value})
        assert len(str(caught.value)) < 2500 and "\n" not in str(caught.value)
    assert str(LorakitError("a file:\nnot read\r\n" + "x" * 5000))[:20] == "a file: not read xxx"
    assert len(str(LorakitError("x" * 5000))) < 2000


def test_yamls_scientific_notation_is_explained():
    """What somebody else's reader of YAML 1.1 makes of it; ours does not."""
    given = yaml.safe_load("learning_rate: 1e-4")
    assert given == {"learning_rate": "1e-4"}  # YAML 1.1 wants a dot
    assert params.collect(given)["learning_rate"] == 1e-4  # papermill's
    with pytest.raises(ParameterError, match=r"^learning_rate='1e-4': .*it is a string.*write 1\.0e-04"):
        params.resolve(given)
    assert params.resolve(yaml.safe_load("learning_rate: 1.0e-4")).learning_rate == 1e-4
    with pytest.raises(ParameterError) as caught:
        params.resolve({"learning_rate": "fast"})
    assert "YAML" not in str(caught.value)


def test_what_yaml_takes_for_something_else_than_text_is_to_be_quoted():
    with pytest.raises(ParameterError, match=r"label_column=True: .*: quote them, label_column='\"yes\"'"):
        params.resolve(params.given([], ["label_column=yes"]))
    assert params.given([], ['label_column="yes"']) == {"label_column": "yes"}


def test_an_unknown_key_is_named_with_the_nearest_known_or_all():
    with pytest.raises(ParameterError, match="^learn_rate=0.1: unknown parameter; did you mean 'learning_rate'"):
        params.resolve({"learn_rate": 0.1})
    with pytest.raises(ParameterError, match="^xyz=0.1: unknown parameter; known are .*learning_rate.*search_budget"):
        params.resolve({"xyz": 0.1})


def test_a_whole_number_may_stand_for_a_float_but_not_the_reverse():
    assert params.resolve({"alpha": 32}).alpha == 32.0
    with pytest.raises(ParameterError, match="rank=8.0"):
        params.resolve({"rank": 8.0})


@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ["query", "value"], r".*\.(q|v)_proj"])
def test_target_modules_may_be_text_or_names(targets):
    assert params.resolve({"target_modules": targets}).target_modules == targets


def test_params_do_not_change_after_the_fact():
    with pytest.raises(ValidationError):
        Params().rank = 4


def test_collect_takes_parameters_and_refuses_any_other_literal():
    """papermill only warns of a name it does not know."""
    namespace = {"rank": 4, "torch": object(), "method": "full", "_": 1, "In": [""], "Out": {}, "exit": object()}
    assert params.collect(namespace) == {"rank": 4, "method": "full"}
    for value in (1, 0.1, "a", True, None, [1, ["a"]], {"a": [None]}):
        with pytest.raises(ParameterError, match="learnig_rate=.*: unknown parameter; did you mean 'learning_rate'"):
            params.collect(namespace | {"learnig_rate": value})
    assert params.collect(namespace | {"learnig_rate": [object()], "f": len}) == {"rank": 4, "method": "full"}


# a group of parameters by itself ----------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_a_run_holds_every_group_and_serves_as_it(group):
    run = params.resolve({"rank": 4, "gate": "random", "skip_share": 0.5, "gating": {"method": "flora"}})
    part = group.of(run)
    assert dict(part) == {name: getattr(run, name) for name in group.model_fields} and isinstance(run, group)
    assert group.question and group.__doc__
    assert all(info.description for info in group.model_fields.values())


def test_groups_are_checked_when_made_and_when_changed():
    with pytest.raises(ParameterError, match="^rank=0: .*greater than or equal to 1"):
        AdapterSettings(rank=0)
    settings = AdapterSettings(rank=4)
    assert settings.but(alpha=None) == AdapterSettings(rank=4, alpha=None) and hash(settings) == hash(settings.but())
    with pytest.raises(ParameterError, match="^rank=0: "):
        settings.but(rank=0)


@pytest.mark.parametrize(
    ("given", "says"),
    [({"gate_m": 100}, "gate_m=100: must be a power of two"), ({"gate_k": 512}, "gate_k=512: must be below gate_m=512"),
     ({"gate_rows": 64}, "gate_rows=64: must be 0, or above gate_k=64, at most gate_m=512"),
     ({"prune_start": 0.8}, "prune_end=0.8: must be after prune_start=0.8"), ({"l1": 0.1}, "l1=0.1: is for spars"),
     ({"sparsify": "structured", "sparse_factors": "A"}, "sparse_factors='A': .*must be 'both'")],
)  # fmt: skip
def test_parameters_of_a_group_that_contradict_each_other(given, says):
    with pytest.raises(ParameterError, match=f"^{says}"):
        params.resolve(given)


@pytest.mark.parametrize(
    ("given", "name"),
    [({"label": "a\ud83d"}, "label"), ({"target_modules": ["q", "\udc80"]}, "target_modules"),
     ({"method": "peft", "peft_type": "DORA", "peft_options": {"x": ["\ud800"]}}, "peft_options")],
)  # fmt: skip
def test_half_a_character_is_refused_by_name(given, name):
    with pytest.raises(ParameterError, match=f"^{name}=.*surrogates not allowed"):
        Params(**given)


# what is told of them ---------------------------------------------------------------------------------


IDLE = [
    ({"gating": {"mode": "fractional"}}, "gating.mode='fractional': says nothing without gating.method"),
    (
        {"gating": {"method": "random", "score": "loss"}},
        "gating.score='loss': says nothing without gating.method 'flora'",
    ),
    ({"gating": {"method": "flora", "score": "loss", "sketch_dim": 64}}, "gating.sketch_dim=64: says nothing without"),
    ({"gate_rate": 0.5}, "gate_rate=0.5: says nothing without gate"),
    ({"task": "labeled", "text_column": "b"}, "text_column='b': says nothing without task one of .*; task='labeled'"),
    ({"skip_share": 0.5}, "skip_share=0.5: says nothing without skip"),
    (
        {"skip": "adapter", "skip_decide": "forward", "skip_measure_every": 9},
        "skip_measure_every=9: says nothing without",
    ),
    ({"method": "lora", "sparsity": 0.7}, "sparsity=0.7: says nothing without method 'sparse'"),
    ({"method": "sparse", "sparsify": "l1", "l1": 0.1, "sparsity": 0.7}, "sparsity=0.7: says nothing without l1 0"),
    ({"double_quant": False}, "double_quant=False: says nothing without quantize"),
    ({"loss": "liger", "logits_mib": 50}, "logits_mib=50.*: says nothing without loss 'exact'"),
    ({"redundancy_pool": 8}, "redundancy_pool=8: says nothing without redundancy"),
]


@pytest.mark.parametrize(("given", "says"), IDLE)
def test_what_would_change_nothing_is_refused_by_every_door(tmp_path, given, says):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(given))
    for doors in (params.resolve(given), params.resolve(params.given([tmp_path / "own.yaml"], []))):
        with pytest.raises(ParameterError, match=f"^{says}"):
            params.check(doors)


@pytest.mark.parametrize(
    "given",
    [
        {"setting": "toy", "row": "slora", "gate": "none"},
        {"setting": "toy-instruct", "row": "pps_fractional", "gating": {"method": "baseline"}},
        {"setting": "toy", "row": "sparse", "method": "lora"},
        {"setting": "toy", "row": "skip", "skip": "none"},
        {"setting": "toy-instruct", "row": "flora", "loss": "nll"},
    ],
)
def test_who_switches_a_rows_change_off_need_not_name_what_belonged_to_it(given):
    params.check(params.resolve(given))


@pytest.mark.parametrize("value", ["x", [], {1: 2}, None])
def test_a_switch_that_is_no_value_of_its_own_is_refused_as_such(value):
    for name in ("skip", "l1", "gating", "redundancy"):  # the gates there are is known where they are
        with pytest.raises(ParameterError, match=f"^{name}"):
            params.check(params.resolve({"setting": "toy", "row": "slora", name: value}))


def test_a_default_may_be_named_though_it_changes_nothing():
    params.check(params.resolve(params.Params().model_dump()))


@pytest.mark.parametrize("markdown", [False, True])
def test_the_reference_names_every_parameter_once(markdown):
    text = params.reference(markdown)
    names = [name for name in Params.model_fields if name != "gating"] + [f"gating.{n}" for n in Gating.model_fields]
    for name in names:
        shown = [line for line in text.split("\n") if line.strip("| `").split(" ")[0].strip("`") == name]
        assert len(shown) == 1, name
    assert "RATES" not in text and "whole number, ≥ 1" in text and "ridge-leverage novelty" in text


def test_the_table_of_what_goes_together_is_the_check_itself(capsys):
    table = params.capabilities()
    assert table["full"]["4 bits"] == "quantize: 4-bit weights cannot be trained: method 'full'"
    assert table["hira"]["SkipLoRA"].startswith("skip: needs a method of lora")
    assert table["tokens, fractional"]["checkpointing"].startswith("gradient_checkpointing: drops the keys")
    assert table["lora"] == dict.fromkeys(table["lora"], "yes")
    assert cli.main(["params", "--capabilities"]) == 0
    assert re.search(r"^\| full +\| no \(", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("unit", ["tokens", "flops", "seconds"])
def test_a_schedule_of_ranks_needs_a_budget_in_steps(unit):
    given = {"method": "peft", "peft_type": "adalora", "loss": "nll"}
    with pytest.raises(
        ParameterError, match=f"budget_unit='{unit}': AdaLoRA's ranks go by accepted_steps, epochs, steps"
    ):
        params.check(params.resolve(given | {"budget_unit": unit}))
    for fine in ({"budget_unit": unit, "peft_options": {"total_step": 9}}, {"budget_unit": "epochs"}):
        params.check(params.resolve(given | fine))


def test_shown_says_who_says_what():
    given = params.collect({"setting": "sst2-minilm", "row": "full", "batch_size": 8})
    table = params.shown(given)
    assert tuple(table.loc["learning_rate"]) == (1e-4, "the row") and tuple(table.loc["batch_size"]) == (8, "given")
    assert tuple(table.loc["budget"]) == (300, "the setting") and "seed" not in table.index
    slora = params.shown({"setting": "toy", "row": "slora"})
    assert tuple(slora.loc["gate_k"]) == (16, "the row") and tuple(slora.loc["gate_m"]) == (512, "default")
    assert tuple(slora.loc["model"]) == ("toy-encoder", "default")  # of every run
    assert "sparsity" in params.shown({"setting": "toy", "row": "sparse"}).index and "sparsity" not in slora.index
    assert params.shown({"setting": "toy-instruct", "row": "flora"}).loc["gating", "said by"] == "the row"
    other = params.shown({"model": "gpt2", "task": "mrpc"})
    assert tuple(other.loc["learning_rate"]) == (RATES["lora"][0], "the method's default")


def test_parameters_import_neither_torch_nor_pandas():
    code = "import sys, lorakit.params; print({'torch', 'pandas', 'yaml', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def put(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_later_files_win(tmp_path):
    setting = put(tmp_path, "first.yaml", "setting: s\nrank: 4\nsearch_rates: [0.1, 0.2]\n")
    method = put(tmp_path, "second.yaml", "rank: 16\nsearch_rates: [0.3]\nmethod: lora\n")
    merged = params.read_files([setting, str(method)])
    assert merged == {"setting": "s", "rank": 16, "search_rates": [0.3], "method": "lora"}
    assert params.read_files([method, setting])["rank"] == 4
    assert params.read_files([]) == params.read_files([put(tmp_path, "empty.yaml", "# only a comment\n")]) == {}


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [("- rank\n- 4\n", ParameterError, "must be a mapping"), ("rank", ParameterError, "must be a mapping"),
     ("[]", ParameterError, "must be a mapping"), ("1: 2", ParameterError, "must be a mapping"),
     ("rank: [4", LorakitError, "bad.yaml: not YAML: .*line"), (b"rank: \xff\n", LorakitError, "bad.yaml")],
)  # fmt: skip
def test_a_file_that_is_no_mapping_is_an_error(tmp_path, text, error, says):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=says) as caught:
        params.read_files([path])
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ParameterError, match="^-f=.*none.yaml': no such params file"):
        params.read_files([tmp_path / "none.yaml"])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [("rank=4", "rank", 4), ("alpha=1.0e-4", "alpha", 1e-4), ("learning_rate=1e-4", "learning_rate", 1e-4),
     ("rslora=true", "rslora", True), ("model=a/b", "model", "a/b"), ("rank='4'", "rank", "4"),
     ("target_modules=[q, v]", "target_modules", ["q", "v"]),
     ("data_files=", "data_files", ""), ("target_modules=a=b", "target_modules", "a=b")],
)  # fmt: skip
def test_an_override_has_the_parameters_own_type(text, name, value):
    found = params.parse_override(text)
    assert found == (name, value) and type(found[1]) is type(value)


@pytest.mark.parametrize("text", ["rank", "=4", ""])
def test_an_override_without_a_name_is_an_error(text):
    with pytest.raises(ParameterError, match=f"^-p={text!r}: must be name=value"):
        params.parse_override(text)
    with pytest.raises(ParameterError, match="search_rates"):
        params.parse_override("search_rates=[1,")


# a parameter that is a mapping -----------------------------------------------------------------------


BAD_GATING = [
    ("method", "best", "'baseline', 'random' or 'flora'"), ("topk_tokens", 0.0, "greater than 0"), ("topk_tokens", 1.5,
    "less than or equal to 1"), ("topk_tokens", "0.2", "valid number"), ("sketch_dim", 1, "greater than or equal to 2"),
    ("topk_logits", -1, "greater than or equal to 0"), ("mode", "half", "'gather' or 'fractional'"), ("fraction", 0.2,
    "unknown parameter; known are method, topk_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_GATING)
def test_a_bad_value_inside_a_mapping_is_named_with_it(key, value, allowed):
    with pytest.raises(ParameterError, match=allowed) as caught:
        params.resolve({"gating": {key: value}})
    assert (caught.value.name, caught.value.value) == (f"gating.{key}", value) and "\n" not in str(caught.value)


def test_mappings_are_merged_key_by_key(tmp_path):
    setting = put(tmp_path, "first.yaml", "rank: 4\ngating:\n  topk_tokens: 0.2\n  mode: fractional\n")
    method = put(tmp_path, "second.yaml", "gating: {method: flora, topk_tokens: 0.3}\n")
    given = params.given([setting, method], ["gating.topk_tokens=0.4", "gating.sketch_dim=64", "rank=8"])
    whole = {"method": "flora", "topk_tokens": 0.4, "mode": "fractional", "sketch_dim": 64}
    assert given == {"rank": 8, "gating": whole}
    gating = params.resolve(given).gating
    assert (gating.method, gating.topk_tokens, gating.mode, gating.sketch_dim) == ("flora", 0.4, "fractional", 64)
    assert params.read_files([setting, method])["gating"]["topk_tokens"] == 0.3  # a file is not changed by what follows


def test_an_override_may_be_one_key_or_the_mapping():
    assert params.parse_override("gating.mode=gather") == ("gating", {"mode": "gather"})
    assert params.parse_override("gating={mode: gather}") == ("gating", {"mode": "gather"})
    assert params.given([], ["gating.topk_tokens=0.4"]) == {"gating": {"topk_tokens": 0.4}}
    assert params.parse_override("model.x=gather") == ("model.x", "gather")  # no mapping: refused as unknown


def test_what_runs_beside_a_run_is_the_readers_too():
    given = complete({"setting": "sst2-minilm", "row": "slora", "seed": 3, "budget": 40, "run_dir": "kept"})
    other = params.resolve(beside(given, "lora"))
    assert (other.row, other.gate, other.run_dir) == ("lora", "none", "")
    assert (other.model, other.seed, other.budget, other.learning_rate) == ("all-MiniLM-L6-v2", 3, 40, 1.0e-3)
    full = params.resolve(beside(given, "full"))
    own = params.resolve({"setting": "sst2-minilm", "row": "full"}).learning_rate
    assert full.learning_rate == own != 1.0e-3
    assert params.resolve(beside(given | {"learning_rate": 2.0e-3}, "full")).learning_rate == 2.0e-3  # the reader's
    coin = params.resolve(beside(given, "a coin", gate="random", gate_rate=0.5))
    assert (coin.row, coin.gate, coin.gate_rate, coin.budget) == ("a coin", "random", 0.5, 40)


def test_a_budget_is_of_something_that_curves_are_drawn_against():
    assert {*get_args(Params.model_fields["budget_unit"].annotation)} - {"epochs"} <= {*AXES}  # which are steps
