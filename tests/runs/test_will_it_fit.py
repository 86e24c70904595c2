"""The predictions in `results/will_it_fit.csv` are the script's: all of its grid, and two of them made anew."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lorakit.measure.live import KINDS
from lorakit.runs import plan

SCRIPT = Path(__file__).parents[2] / "scripts" / "will_it_fit.py"
_found = importlib.util.spec_from_file_location("will_it_fit", SCRIPT)
script = importlib.util.module_from_spec(_found)
_found.loader.exec_module(script)


def test_the_file_holds_the_grid_and_nothing_else_in_its_order_and_form(tmp_path):
    lines = script.read()
    assert [*lines] == [*script.grid()]
    for line in lines.values():
        assert sum(int(line[kind]) for kind in KINDS) == pytest.approx(int(line["peak"]), abs=len(KINDS))  # of a line
    script.write(lines, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == script.FILE.read_bytes()
    assert len(script.FILE.read_bytes()) < 200_000


@pytest.mark.parametrize(
    ("model", "way"), [("distilbert-base-uncased", "LoRA"), ("google/gemma-3-270m", "LoRA, 512 tokens")]
)
def test_a_line_made_again_is_the_same(model, way):
    made = script.line_of(model, way, script.grid()[model, way])
    assert {name: str(value) for name, value in made.items()} == script.read()[model, way]


def test_layers_that_rest_take_nothing_where_none_does():
    """What the script puts together for SkipLoRA is the planner's prediction, but for what rests."""
    model, sizes = "distilbert-base-uncased", {"batch": 2, "seq": 16}
    found = plan.predict(plan.Plan(model=model, **sizes))
    none, half = (script.resting(model, **sizes, skip_share=share) for share in (0, 0.5))
    assert none == found.memory | {name: getattr(found, name) for name in ("flops", "trainable", "total")} | sizes
    assert half["trainable"] == none["trainable"] and half["parameters"] == none["parameters"]
    assert half["flops"] < 0.85 * none["flops"] and half["activations"] < 0.8 * none["activations"]


def test_lines_that_are_there_are_kept_and_the_others_made_one_by_one(tmp_path, monkeypatch, capsys):
    made, file, (first, second) = [], tmp_path / "results" / "some.csv", script.MODELS[:2]
    grid = {(model, way): {} for model in (first, second) for way in ("LoRA", "full")}
    monkeypatch.setattr(script, "grid", lambda: grid)
    monkeypatch.setattr(script, "predicted", lambda model, **_: made.append(model) or dict.fromkeys(script.NUMBERS, 7))
    assert script.main([second], file) == 0 and made == [second] * 2 and len(script.read(file)) == 2
    assert script.main([], file) == 0 and made[2:] == [first] * 2
    assert [*script.read(file)] == [*grid]
    assert script.main([], file) == 0 and len(made) == 4
    assert script.main([first, "--again"], file) == 0 and made[4:] == [first] * 2
    assert "GB  distilbert-base-uncased: LoRA\n" in capsys.readouterr().out


def test_an_unknown_model_is_one_clear_error(capsys):
    assert script.main(["gpt-5"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("model='gpt-5': one of distilbert-base-uncased, ") and said.err.count("\n") == 1
    assert said.out == ""


def test_a_configuration_that_is_not_packaged_is_refused(monkeypatch):
    found = plan.Prediction({}, 0, 0, 0, "hub, from its local cache", 8, 64)
    monkeypatch.setattr(plan, "predict", lambda _: found)
    with pytest.raises(script.LorakitError, match="is read from hub, from its local cache; wanted: packaged"):
        script.predicted("google/gemma-3-270m", batch=1, seq=8)
