"""Every row on a model or data of the hub, end to end from a stand-in of the hub's cache, by the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import pytest
from safetensors import safe_open
from small_models import LINEARS

from lorakit import assets, cli, params, records
from lorakit.files import PARAMS
from lorakit.runs.search import best_rate
from lorakit.tasks import registry
from lorakit.tasks.toy import models as toys

HUB_TASKS = {  # task -> repository and folder its files are in
    "sst2": (hub_stand_in.GLUE, "sst2"), "mrpc": (hub_stand_in.GLUE, "mrpc"), "tulu": (hub_stand_in.TULU, "data"),
    "imdb": (hub_stand_in.IMDB, "plain_text"), "wikitext2": (hub_stand_in.WIKITEXT, "wikitext-2-raw-v1"),
}  # fmt: skip
FILES = {"sst2": 2, "mrpc": 3, "imdb": 2, "wikitext2": 3, "tulu": 6}  # that a run reads, of those that are there
FAMILIES = {"distilbert-base-uncased": "distilbert", "gpt2": "gpt2", "toy-gpt2": "gpt2"}  # else Gemma
FOUND = {path.parent.name: params.files.read(path) for path in sorted(PARAMS.glob("*/_setting.yaml"))}
# an offline asset stands in for the model elsewhere, see `lorakit fetch`; its tasks' files are these
SETTINGS = {
    name: said
    for name, said in FOUND.items()
    if said.get("task") in HUB_TASKS and said.get("model") not in assets.ASSETS
}
ROWS = [(setting, row) for setting in SETTINGS for row in params.files.rows_of(PARAMS / setting)]
CUT = {
    "budget": 3,
    "budget_unit": "accepted_steps",
    "evaluations": 1,
    "max_train": 48,
    "max_validation": 8,
    "max_test": 8,
    "max_length": 64,
}
CUT |= {"batch_size": 4, "eval_batch_size": 8, "latency_repeats": 1, "predict_memory": False}
NOT_SEARCHED = "learning rate not searched"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder for HF_HOME with the stand-in inside."""
    folder = tmp_path_factory.mktemp("home")
    hub_stand_in.build(folder)
    return folder


@pytest.fixture
def offline(home, monkeypatch) -> Path:
    """The stand-in is this process's cache, and the hub is switched off; gives the cache."""
    monkeypatch.delenv("LORAKIT_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return home / "hub"


def arguments(setting: str, row: str, **given) -> list[str]:
    """The command line of a row, cut to what a test has time for."""
    run = params.params_of(setting, row)
    cut = CUT | ({"gradient_accumulation": 2} if run.get("gradient_accumulation", 1) > 2 else {})
    cut |= {"gate_burn_in": 1} if run.get("gate", "none") != "none" else {}
    options = [f"{name}={json.dumps(value)}" for name, value in (cut | given).items()]
    return ["-f", str(PARAMS / setting / f"{row}.yaml"), *[part for option in options for part in ("-p", option)]]


def checkpoint(hub: Path, model: str) -> dict[str, list[int]]:
    """Name -> shape of all that is stored of a model."""
    toy = model in toys.NAMES
    folder = toys.folder(model) if toy else hub / f"models--{model.replace('/', '--')}" / "snapshots"
    shapes = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def counts(hub: Path, run: params.Params) -> tuple[int, int]:
    """Parameters that the row trains, and all there are: from the checkpoint's shapes."""
    shapes, family, head = checkpoint(hub, run.model), FAMILIES.get(run.model, "gemma"), 0
    if registry.recipe(run.task).form == "labelled":
        embeddings = ("word_embeddings.weight", "wte.weight")
        width = next(shape[1] for name, shape in shapes.items() if name.endswith(embeddings))
        head = {"distilbert": width * width + width + 2 * width + 2, "gpt2": 2 * width}[family]
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("vocab_")}  # a masked model's
    base = sum(map(math.prod, shapes.values()))
    if run.method in ("head", "full"):
        return head + base * (run.method == "full"), base + head
    adapted = tuple(f"{layer}.weight" for layer in [*LINEARS[family], "vocab_transform"])  # the last, a masked model's
    linear = [shape for name, shape in shapes.items() if name.endswith(adapted) and "vision_tower" not in name]
    added = run.rank * sum(map(sum, linear))
    return added + head, base + added + head


def test_the_settings_are_those_of_the_hub():
    assert {name.split("-")[0] for name in SETTINGS} == {*HUB_TASKS} and len(ROWS) >= 43
    assert {said["model"] for said in SETTINGS.values()} == {*hub_stand_in.MODELS, "toy-gpt2"}
    assert {*HUB_TASKS} == {name for name, recipe in registry.RECIPES.items() if recipe.origin.startswith("hub")}


@pytest.mark.parametrize(("setting", "row"), ROWS, ids=["/".join(row) for row in ROWS])
def test_a_row_runs_to_its_record(offline, tmp_path, capsys, setting, row):
    path, asked = tmp_path / "s0.json", params.resolve({"setting": setting, "row": row})
    status, (shown, told) = cli.main(["train", *arguments(setting, row, record=str(path))]), capsys.readouterr()
    assert status == 0, told
    record = records.read(path)
    assert (record.status, record.message) == ("done", "")
    assert (record.setting, record.costs.accepted_steps, record.curve[-1].step) == (setting, 3, record.costs.steps)
    kept = ("model", "task", "method", "quantize", "skip", "gate", "optimizer", "precision", "dtype", "learning_rate")
    assert {name: record.resolved[name] for name in kept} == {name: getattr(asked, name) for name in kept}
    assert record.resolved["gating"] == asked.gating.model_dump()

    for metrics in record.final.values():
        assert metrics["loss"] > 0 and all(map(math.isfinite, metrics.values()))
    assert all(math.isfinite(point.train_loss) for point in record.curve if point.step)

    prints, (repository, under) = record.fingerprints, HUB_TASKS[asked.task]
    home = offline / f"datasets--{repository.replace('/', '--')}"
    links = (home / "snapshots" / hub_stand_in.COMMIT / under).iterdir()
    files = {f"{under}/{link.name}": link.resolve().name for link in links}  # a blob is called by its sha256
    assert prints["data"].items() <= files.items() and len(prints["data"]) == FILES[asked.task]
    assert prints["data_source"] == f"hub {repository}"
    packaged = asked.model in toys.NAMES
    assert len(prints["model"]) == 64 if packaged else prints["model"] == f"hub commit {hub_stand_in.COMMIT}"
    assert prints["model_source"] == ("packaged toy model" if packaged else "hub, from its local cache")

    trained = record.parameters.trainable
    assert (trained, record.parameters.total) == counts(offline, asked)
    assert (record.parameters.nonzero < 0.9 * trained) == (asked.method == "sparse")

    assert (NOT_SEARCHED in record.notes) == (not asked.learning_rate_from) == ("rate not searched" in shown)
    details = {"weights": asked.quantize != "none", "skip": asked.skip != "none", "gate": asked.gate != "none",
               "tokens": asked.gating.selective, "sparsity": asked.method == "sparse"}  # fmt: skip
    assert {name: name in record.details for name in details} == details
    if asked.gate == "random":
        assert record.details["gate"]["decisions"] == record.costs.steps >= 3


@pytest.mark.parametrize("setting", [name for name, said in SETTINGS.items() if said.get("search_rates")])
def test_a_rate_is_searched_and_then_said_to_be(offline, tmp_path, capsys, setting):
    """Of each setting's reference, by all the rates that the setting lists."""
    row = "lora" if "lora" in params.files.rows_of(PARAMS / setting) else "qlora"
    path = tmp_path / "lr.json"
    given = {"record": str(path), "search_budget": 2}
    assert cli.main(["search", *arguments(setting, row, **given)]) == 0
    found, wanted = records.read(path), SETTINGS[setting]["search_rates"]
    assert (found.kind, found.status) == ("lr_search", "done")
    assert [(point.learning_rate, point.status) for point in found.search] == [(rate, "done") for rate in wanted]
    rate = best_rate(found)
    assert capsys.readouterr().out.endswith(f"best: learning_rate: {rate:.1e}\n")
    given = {"learning_rate": rate, "learning_rate_from": str(path), "record": str(tmp_path / "s0.json")}
    assert cli.main(["train", *arguments(setting, row, **given)]) == 0
    record = records.read(tmp_path / "s0.json")
    assert NOT_SEARCHED in found.notes and NOT_SEARCHED not in record.notes
    assert record.fingerprints == found.fingerprints and "not searched" not in capsys.readouterr().out


def test_a_process_of_its_own_finds_the_cache_by_its_environment(home, tmp_path):
    """HF_HOME and HF_HUB_OFFLINE, which the hub's client reads as it is imported."""
    row = arguments("sst2-distilbert", "lora", record=str(tmp_path / "s0.json"), run_dir=str(tmp_path / "run"))
    own = {name: value for name, value in os.environ.items() if name not in ("LORAKIT_DATA", "HF_HUB_CACHE")}
    own |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "lorakit", "train", *row], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = records.read(tmp_path / "s0.json")
    assert (record.status, record.fingerprints["model"]) == ("done", f"hub commit {hub_stand_in.COMMIT}")
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "distilbert-base-uncased"
