"""The contract of the notebooks that nbval cannot check, and of the params files that override them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest

from lorakit import records
from lorakit.params import collect, params_of, resolve
from lorakit.runs import sweep
from lorakit.runs.notebooks import FINISHED, checked, parameters, whole
from lorakit.runs.rows import notebook_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
SETTINGS = ROOT / "params"

each_notebook = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
each_params_file = pytest.mark.parametrize(
    "path",
    [path for path in sorted(SETTINGS.glob("*/[!_]*.yaml")) if (path.parent / "_setting.yaml").exists()],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
each_record = pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("results/*/*/s[0-9]*.json")),
    ids=lambda path: path.relative_to(ROOT / "results").as_posix(),
)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [
        cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()
    ]


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(path) for output in cell.outputs]


@each_notebook
def test_executed_from_top_to_bottom(path):
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    assert outputs(path), "no outputs: make notebooks"


@each_notebook
def test_nothing_failed_and_nothing_went_to_stderr(path):
    assert [o for o in outputs(path) if o.output_type == "error" or o.get("name") == "stderr"] == []


@each_notebook
def test_figures_are_png_alone(path):
    kinds = {kind for output in outputs(path) for kind in output.get("data", {})}
    assert kinds <= {"image/png", "text/plain", "text/html", "text/markdown", "text/latex"}
    for output in outputs(path):
        if "image/png" in output.get("data", {}):
            assert not re.search(r"\b0x[0-9a-f]{4,}", output.data.get("text/plain", ""))  # an address in memory


@each_notebook
def test_kernel_and_metadata_are_those_of_any_machine(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not {"papermill", "language_info", "widgets"} & notebook.metadata.keys()
    assert not any({"papermill", "execution"} & cell.metadata.keys() for cell in notebook.cells)
    assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)


@each_notebook
def test_cells_are_short_and_end_in_values(path):
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 20 or "parameters" in cell.metadata.get("tags", []), cell.source
        assert not cell.source.rstrip().endswith(";"), cell.source


@each_notebook
def test_cells_are_compared_not_skipped(path):
    tags = [tag for cell in code_cells(path) for tag in cell.metadata.get("tags", [])]
    assert tags.count("nbval-ignore-output") <= 2
    assert not {"nbval-skip", "nbval-raises-exception", "raises-exception", "skip-execution"} & set(tags)
    text = "\n".join(cell.source for cell in code_cells(path))
    assert "NBVAL_" not in text and "%%" not in text


@each_notebook
def test_no_class_and_no_training_loop(path):
    for cell in code_cells(path):
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.ClassDef)]


@each_notebook
def test_a_notebooks_parameters_are_a_runs_own(path):
    # `parameters` itself refuses a missing tag and anything but bare literals
    assert resolve(parameters(path))


@each_params_file
def test_params_files_fit_the_methods_notebook(path):
    given = params_of(path.parent.name, path.stem) | dict.fromkeys(("record", "run_dir"), "x")
    notebook = FOLDER / notebook_of(resolve(given))
    injected = whole(notebook, given)
    assert checked(notebook, given) == {name: injected[name] for name in given}
    # as papermill has it; nothing of the notebook's toy run is left
    assert resolve(collect(parameters(notebook) | injected)) == resolve(given)


@each_record
def test_committed_records_are_what_the_params_files_ask_for(path):
    record = records.read(path)
    if record.kind != "run":
        pytest.skip("a search has its own budget and rates")
    setting, method, seed = path.parts[-3], path.parts[-2], int(path.stem[1:])
    assert (record.setting, record.method, record.seed) == (setting, method, seed)
    assert record.status in FINISHED
    assert sweep.Run(ROOT, setting, method, seed).differences() == {}
