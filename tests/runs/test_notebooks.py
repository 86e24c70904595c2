"""The contract of the notebooks that nbval cannot check, and of the doors by which a run is asked for."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml

from lorakit import cli, records
from lorakit.errors import ParameterError
from lorakit.params import Params, collect, given, merge, params_of, resolve
from lorakit.params.files import RESOURCES, read
from lorakit.params.whole import notebook_of
from lorakit.runs import sweep
from lorakit.runs.notebooks import FINISHED, checked, parameters, whole

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
SETTING_FILES = sorted((ROOT / "params").rglob("*.yaml"))

each_notebook = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in cells(path) if cell.cell_type == "code" and cell.source.strip()]


def tags(path: Path) -> list[str]:
    return [tag for cell in cells(path) for tag in cell.metadata.get("tags", [])]


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(path) for output in cell.outputs]


@each_notebook
def test_executed_from_top_to_bottom_without_failure_and_without_stderr(path):
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    assert outputs(path), "no outputs: make notebooks"
    assert [o for o in outputs(path) if o.output_type == "error" or o.get("name") == "stderr"] == []


@each_notebook
def test_figures_are_png_alone(path):
    kinds = {kind for output in outputs(path) for kind in output.get("data", {})}
    assert kinds <= {"image/png", "text/plain", "text/html", "text/markdown", "text/latex"}
    for output in outputs(path):
        if "image/png" in output.get("data", {}):
            assert not re.search(r"\b0x[0-9a-f]{4,}", output.data.get("text/plain", ""))  # an address in memory


@each_notebook
def test_a_figure_says_in_words_what_it_shows_and_has_its_caption_under_it(path):
    for cell in code_cells(path):
        for place, output in enumerate(cell.outputs):
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 20, cell.source
                assert re.fullmatch(r"\*[^*`]{20,}\*", cell.outputs[place + 1].data["text/markdown"]), cell.source


@each_notebook
def test_kernel_and_metadata_are_those_of_any_machine(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not {"papermill", "language_info", "widgets"} & notebook.metadata.keys()
    assert not any({"papermill", "execution"} & cell.metadata.keys() for cell in notebook.cells)
    assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)


@each_notebook
def test_cells_are_few_and_short_and_end_in_values(path):
    assert len(cells(path)) < 35
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 20, cell.source
        assert not cell.source.rstrip().endswith(";"), cell.source


@each_notebook
def test_cells_are_compared_not_skipped(path):
    assert tags(path).count("nbval-ignore-output") <= 2
    assert set(tags(path)) <= {"parameters", "nbval-ignore-output"}
    text = "\n".join(cell.source for cell in code_cells(path))
    assert "NBVAL_" not in text and "%%" not in text


@each_notebook
def test_no_class_and_no_run_of_other_data_than_the_readers(path):
    for cell in code_cells(path):
        nodes = [*ast.walk(ast.parse(cell.source))]
        assert not [node for node in nodes if isinstance(node, ast.ClassDef)]
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) == "lorakit.run" for node in nodes):
            assert "params_of" not in cell.source, cell.source  # beside(given, row) is the reader's


@each_notebook
def test_the_parameters_cell_says_which_run_and_no_more(path):
    cell = parameters(path)  # which itself refuses a missing tag and anything but bare literals
    assert [*cell] == ["setting", "row", "seed", "record", "run_dir"]
    assert (cell["seed"], cell["record"], cell["run_dir"]) == (0, "", "")
    assert resolve(collect(cell)) == resolve(params_of(cell["setting"], cell["row"]))
    assert code_cells(path)[0].metadata.tags == ["parameters"] and "any parameter" in code_cells(path)[0].source


@each_notebook
def test_the_next_cell_collects_before_it_defines_anything_and_shows_what_it_found(path):
    *before, last = ast.parse(code_cells(path)[1].source).body
    collects = [ast.unparse(node) for node in before].index("given = lorakit.collect(globals())")
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in before[:collects])
    assert ast.unparse(last) == "lorakit.shown(given)"


def name(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("path", SETTING_FILES, ids=name)
def test_params_files_name_known_parameters(path):
    if path.parent.name != "accelerate":  # whose files are accelerate's own
        assert (yaml.safe_load(path.read_text()) or {}).keys() <= {*Params.model_fields, RESOURCES}


@pytest.mark.parametrize(
    "path",
    [path for path in SETTING_FILES if path.stem[0] != "_" and (path.parent / "_setting.yaml").exists()],
    ids=name,
)
def test_all_doors_ask_for_the_same_run(path):
    """Of every params file, through its method's notebook, whose own cell asks for another run."""
    setting, row = path.parent.name, path.stem
    own = {"seed": 3, "record": "x", "run_dir": "x"}
    named = {"setting": setting, "row": row} | own
    notebook = FOLDER / notebook_of(resolve(named))
    cell, files = parameters(notebook), [path.parent / "_setting.yaml", path]
    typed, own_typed = ([f"{name}={value}" for name, value in pairs.items()] for pairs in (named, own))
    arguments = [text for file in files for text in ("-f", str(file))] + [t for pair in own_typed for t in ("-p", pair)]
    runs = {
        "by hand, as papermill -p": collect(cell | named),
        "papermill -f": collect(cell | params_of(setting, row) | own),
        "papermill -f, its last": collect(cell | merge(*map(read, files)) | named),
        "-f of the row": given(files[1:], own_typed),
        "params_of": params_of(setting, row) | own,
        "lorakit run -p": collect(cell | checked(notebook, given([], typed))),
        "lorakit run -f": collect(cell | whole(notebook, given(files, own_typed))),
        "lorakit train -p": cli._given("train", [text for pair in typed for text in ("-p", pair)]),
        "lorakit train -f": cli._given("train", arguments),
    }
    wanted = resolve(named)
    assert {door for door, found in runs.items() if resolve(found) != wanted} == set()


@each_notebook
@pytest.mark.parametrize(("wrong", "meant"), [("learnig_rate", "learning_rate"), ("sead", "seed")])
def test_a_mistyped_name_is_refused_by_the_cell_that_collects(path, wrong, meant):
    with pytest.raises(ParameterError, match=f"{wrong}=1: unknown parameter; did you mean '{meant}'"):
        collect(parameters(path) | {wrong: 1})


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/*/s[0-9]*.json")), ids=lambda p: "/".join(p.parts[-3:]))
def test_committed_records_are_what_the_params_files_ask_for(path):
    record = records.read(path)
    if record.kind != "run":
        pytest.skip("a search has its own budget and rates")
    setting, method, seed = path.parts[-3], path.parts[-2], int(path.stem[1:])
    assert (record.setting, record.method, record.seed) == (setting, method, seed)
    assert record.status in FINISHED
    assert sweep.Run(ROOT, setting, method, seed).differences() == {}


@pytest.mark.parametrize(("loss", "differs"), [("nll", False), ("exact", True), ("dft", True)])
def test_a_record_older_than_the_loss_was_made_of_all_logits(tmp_path, loss, differs):
    name = "instruct-gemma3-270m/lora/s0"
    old = records.read(ROOT / "results" / f"{name}.json")
    assert "loss" not in old.resolved
    shutil.copytree(ROOT / "params" / old.setting, tmp_path / "params" / old.setting)
    file = tmp_path / "params" / old.setting / "_setting.yaml"
    file.write_text(file.read_text().replace("loss: nll", f"loss: {loss}"))
    records.write(old, tmp_path / "results" / f"{name}.json")
    assert sweep.Run(tmp_path, old.setting, "lora", 0).differences() == ({"loss": ("nll", loss)} if differs else {})
