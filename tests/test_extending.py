"""One adapter, one gate, one task and one figure from outside the package, and what each costs."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch
import training_runs
from matplotlib.figure import Figure

import lorakit
from lorakit import files
from lorakit.adapters.layer import ADAPTERS, AdapterLayer
from lorakit.gates import GATES
from lorakit.gates.log import GateLog
from lorakit.seams import Decision, Gate
from lorakit.settings import AdapterSettings
from lorakit.tasks.corpus import Corpus, Labelled, Recipe
from lorakit.tasks.registry import RECIPES

QUICK = training_runs.QUICK | {"budget": 4, "batch_size": 4, "rank": 2}


class OutputScale(AdapterLayer):
    """ΔW = diag(s)·W0 with s = 0 at first: the outputs of each layer are scaled."""

    has_alpha = False
    peft_type = "OUTPUT_SCALE"
    parameter_names = ("scale",)
    peft_fields = frozenset({"r"})

    def __init__(self, base_layer, settings, generator=None):
        super().__init__(base_layer, settings)
        self.scale = self.new_parameter(torch.zeros(self.out_features))

    def delta_weight(self):
        return self.scale[:, None] * self.base_weight()

    def adapted(self, x):
        bias = 0 if self.bias is None else self.bias
        out = self.base_layer(x)
        return out + ((out - bias) * self.scale).to(out.dtype)

    @staticmethod
    def settings_to_peft(settings):
        return {"r": settings.rank}

    @staticmethod
    def settings_from_peft(config):
        return AdapterSettings(rank=config["r"], alpha=None)


class EveryOther(Gate):
    """Accepts every second batch."""

    name, selective, target_rate = "every_other", True, 0.5

    def __init__(self, rate):
        self.rate, self.seen = rate, 0

    @classmethod
    def from_settings(cls, settings, model, kind, seed):
        return cls(settings.gate_rate)

    def decide(self, measured):
        self.seen += 1
        return Decision(self.seen % 2 == 1)


def colours() -> Corpus:
    """Which of two words a sentence holds."""
    rows = [
        Labelled(f"number {n} is {word}", None, label) for n in range(48) for label, word in enumerate(("red", "blue"))
    ]
    return Corpus(rows[:64], rows[64:80], rows[80:])


def seconds(records) -> Figure:
    """Seconds of each row: a figure is a function of the records' frame."""
    drawn = Figure()
    ax = drawn.subplots()
    runs = lorakit.frame(records).runs
    ax.bar(runs["row"], runs["seconds"])
    return drawn


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "output_scale", OutputScale)
    monkeypatch.setitem(GATES, "every_other", EveryOther)
    monkeypatch.setitem(RECIPES, "colours", Recipe("labelled", "made up here", colours))


@pytest.mark.usefixtures("registered")
def test_an_adapter_a_gate_a_task_and_a_figure_from_outside_run_end_to_end(tmp_path):
    given = {"method": "output_scale", "gate": "every_other", "task": "colours", "run_dir": str(tmp_path / "run")}
    record = lorakit.run(QUICK | given | {"record": str(tmp_path / "records" / "s0.json")})
    assert (record.status, record.costs.accepted_steps, record.costs.steps) == ("done", 4, 7)
    assert record.details["gate"]["name"] == "every_other"
    assert 0 < record.parameters.trainable < record.parameters.total
    drawn = seconds(lorakit.read_all(tmp_path / "records"))
    assert len(drawn.axes[0].patches) == 1 and isinstance(lorakit.frame([record]).runs, pd.DataFrame)


def test_a_gate_says_itself_whether_it_scores_novelty():
    from lorakit.analysis.gate_figures import NOVELTY_GATES

    assert set(NOVELTY_GATES) == {name for name, gate in GATES.items() if gate.scores_novelty}
    assert GateLog(EveryOther(0.5)).gate.scores_novelty is False


def test_contributing_is_short_and_says_what_something_new_costs():
    text = (files.PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    costs = dict(re.findall(r"^\| (.+?) \| (\d+) \|", text, re.M))
    known = ("adapter", "adapter with a knob", "gate", "task", "figure", "row of a table", "x-axis")
    assert costs == dict(zip(known, "1211101", strict=True))
