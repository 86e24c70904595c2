"""What each row can do: the file is the script's, the code says the same today, and a fault ends the command."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys

import pytest

from lorakit.adapters import LoRALayer
from lorakit.errors import ParameterError
from lorakit.files import PROJECT

sys.path.insert(0, str(PROJECT / "scripts"))
capability = importlib.import_module("capability")
toy_runs = importlib.import_module("toy_runs")

CHEAP = ("encoder", "decoder", "merge", "merge_4bit", "export", "peft")
TRIED = [(row, name) for row in ("lora", "sparse", "hira", "qlora") for name in CHEAP]
TRIED += [("lora", "prefix_cache"), ("slora", "examples")]
REFUSED = [("flora", "encoder"), ("flora_fractional", "masked"), ("full", "prefix_cache")]


@pytest.fixture(scope="module")
def committed():
    return json.loads(capability.FILE.read_text())


def test_the_file_names_the_rows_and_columns_of_the_script(committed):
    assert [*committed["rows"]] == [*capability.ROWS] and [*committed["columns"]] == [*capability.COLUMNS]
    assert (PROJECT / committed["made_by"].split()[1]).is_file()
    for name, column in committed["columns"].items():
        assert column["asks"] == capability.COLUMNS[name].asks
        assert re.fullmatch("[0-9a-f]{64}", column["code"]) and all(column["versions"].values())
    for cells in committed["rows"].values():
        assert [*cells] == [*capability.COLUMNS]
        for name, cell in cells.items():
            if cell["can"]:
                assert cell.keys() == {"can", "measured", "unit"} and cell["unit"] == capability.COLUMNS[name].unit
                assert math.isfinite(cell["measured"]) if cell["unit"] else cell["measured"] is None
            else:
                assert cell.keys() == {"can", "why"} and cell["can"] in (False, None)
                assert "\n" not in cell["why"] and not re.search(r"/(tmp|home|root|work|usr)/", cell["why"])
                assert cell["can"] is False or cell["why"].startswith(("not applicable: ", "not tried: "))


@pytest.mark.parametrize(("row", "name"), TRIED + REFUSED)
def test_the_code_says_today_what_the_file_says(committed, row, name):
    now, then = capability.cell(row, name), committed["rows"][row][name]
    assert {key: now.get(key) for key in ("can", "why")} == {key: then.get(key) for key in ("can", "why")}


def test_what_is_asked_has_both_answers(committed):
    assert {committed["rows"][row][name]["can"] for row, name in TRIED} == {True, None}
    assert {committed["rows"][row][name]["can"] for row, name in REFUSED} == {False}


# --- what is no refusal of the package's is a fault ------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Columns that answer what `answers` holds by name, else 1."""
    answers = {}

    def ask(name):
        def answer(row, folder):
            if isinstance(found := answers.get(name, 1.0), Exception):
                raise found
            return found

        return capability.Column(f"asks {name}", answer, "nats")

    monkeypatch.setattr(capability, "COLUMNS", {name: ask(name) for name in capability.COLUMNS})
    return answers


def test_only_a_refusal_of_the_package_is_a_no(asked):
    asked |= {"merge": ParameterError("rank", 0, "must be more"), "peft": capability.NotTried("not tried: no PEFT")}
    asked |= {"export": ValueError("a bug")}
    assert capability.cell("lora", "encoder") == {"can": True, "measured": 1.0, "unit": "nats"}
    assert capability.cell("lora", "merge") == {"can": False, "why": "rank=0: must be more"}
    assert capability.cell("lora", "peft") == {"can": None, "why": "not tried: no PEFT"}
    with pytest.raises(ValueError, match="a bug"):
        capability.cell("lora", "export")


def test_some_columns_are_made_anew_and_the_others_kept(asked, tmp_path, capsys):
    file = tmp_path / "capability.json"
    with pytest.raises(SystemExit):
        capability.main(["--only", "merge", "--output", str(file)])
    assert "make it whole first" in capsys.readouterr().err and not file.exists()
    capability.main(["--output", str(file)])
    first = json.loads(file.read_text())
    asked |= {name: 2.0 for name in capability.COLUMNS}
    capability.main(["--only", "export,merge", "--output", str(file)])
    second = json.loads(file.read_text())
    for before, after in zip(first["rows"].values(), second["rows"].values(), strict=True):
        assert [*before] == [*after]
        assert {name for name in before if before[name] != after[name]} == {"merge", "export"}
    kept = file.read_bytes()
    asked["export"] = ValueError("a bug")
    for given, error in (("merge,export", ValueError), ("merge,nothing", SystemExit)):
        with pytest.raises(error):
            capability.main(["--only", given, "--output", str(file)])
    assert file.read_bytes() == kept and [*tmp_path.iterdir()] == [file]


def test_a_merge_that_is_wrong_ends_the_command(monkeypatch):
    right = LoRALayer.delta_weight
    monkeypatch.setattr(LoRALayer, "delta_weight", lambda layer: 1.01 * right(layer))
    for name in ("merge", "export"):
        with pytest.raises(RuntimeError, match="lora, toy-encoder: logits differ by"):
            capability.cell("lora", name)


def test_a_row_whose_method_did_nothing_is_a_fault():
    params = toy_runs.params_of("skip", "encoder")
    with pytest.raises(RuntimeError, match="skip: its method did nothing"):
        toy_runs.train(params.model_copy(update={"skip_warmup": 0.99}))


def test_without_a_compiler_the_column_is_not_tried(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert capability.cell("lora", "compile")["why"].startswith("not tried: No working C++ compiler found")
