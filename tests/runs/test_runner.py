"""The notebook runner: bad input is refused before anything runs, a failed run keeps what it did."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import light_notebook
import nbformat
import pytest
from light_notebook import errors, printed

from lorakit import cli
from lorakit.errors import ParameterError
from lorakit.runs import notebooks


@pytest.fixture
def notebook(tmp_path) -> Path:
    return light_notebook.write(tmp_path / "notebooks" / "light.ipynb")


def run(*arguments: str | Path) -> int:
    return cli.main(["run", *map(str, arguments)])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [("rnak=4", "rnak=4: unknown parameter"), ("learning_rate=fast", "learning_rate='fast'"),
     ("rank=0", "rank=0"), ("rank", "-p='rank'")],
)  # fmt: skip
def test_bad_parameters_are_refused_before_anything_runs(notebook, tmp_path, capsys, given, complaint):
    assert run(notebook, "-p", given, "--output", tmp_path / "out" / "done.ipynb") == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_notebook_needs_its_parameters_cell(tmp_path):
    path = light_notebook.write(tmp_path / "a.ipynb", parameters=None)
    with pytest.raises(ParameterError, match="one cell tagged 'parameters', has 0"):
        notebooks.run_notebook(path, tmp_path / "b.ipynb")


@pytest.mark.parametrize("line", ["rank: int = 8", "rank = 4 + 4", "a = b = 1", "import os"])
def test_parameters_are_bare_literals(tmp_path, line):
    path = light_notebook.write(tmp_path / "a.ipynb", parameters=line)
    with pytest.raises(ParameterError, match="bare literals"):
        notebooks.parameters(path)


@pytest.mark.parametrize("source", ["rank = ", "rank = 8)", "rank = 08", "'", "rank = {[]: 1}"])
def test_a_parameters_cell_that_is_not_python_is_one_clear_error(tmp_path, source):
    path = light_notebook.write(tmp_path / "a.ipynb", parameters=source)
    with pytest.raises(ParameterError, match=r"a\.ipynb': (its parameters cell is not Python|.*bare literals)"):
        notebooks.parameters(path)


def test_not_a_notebook(tmp_path, capsys):
    assert run(tmp_path / "missing.ipynb") == 2
    (tmp_path / "text.ipynb").write_text("text")
    assert run(tmp_path / "text.ipynb") == 2
    assert "not a notebook" in capsys.readouterr().err


def test_the_notebook_itself_is_never_the_output(notebook):
    before = notebook.read_bytes()
    assert run(notebook, "--output", notebook) == 2
    assert notebook.read_bytes() == before


def test_files_then_pairs_and_places_as_the_caller_sees_them(notebook, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("setting.yaml").write_text("rank: 2\nlearning_rate: 1.0e-4\n")
    Path("method.yaml").write_text("rank: 3\n")
    files = ["-f", "setting.yaml", "-f", "method.yaml"]
    Path("base").mkdir()
    files += ["-p", "model=base"]
    assert run(notebook, *files, "-p", "seed=5", "-p", "record=out/s5.json", "--output", "out/s5.ipynb") == 0
    resolved = json.loads(Path("out/s5.json").read_text())["resolved"]
    assert (resolved["rank"], resolved["learning_rate"], resolved["seed"]) == (3, 1e-4, 5)
    assert resolved["model"] == str(tmp_path / "base")
    assert "working on lora 5" in capfd.readouterr().out  # seen while it works


def test_what_no_file_names_is_not_the_notebooks_toy_run(tmp_path):
    lines = 'method = "hira"\ngate_k = 5\ngate = "novelty"\nrank = 9'
    path = light_notebook.write(tmp_path / "a.ipynb", parameters=lines)
    assert notebooks.whole(path, {"rank": 3}) == {"gate_k": 64, "gate": "none", "rank": 3}
    assert notebooks.whole(path, {"rank": 9, "max_length": 3}).items() >= {"rank": 9, "max_length": 3}.items()


@pytest.mark.parametrize(("happens", "name"), [("fail", ["AssertionError"]), ("die", [])])
def test_a_failed_run_keeps_its_executed_notebook(notebook, tmp_path, capsys, happens, name):
    output = tmp_path / "out.ipynb"
    assert run(notebook, "-p", f"report_to={happens}", "--output", output) == 1
    assert str(output) in capsys.readouterr().err
    assert errors(output) == name
    if happens == "fail":  # a kernel that dies may take its last words with it
        assert "working on lora 0" in printed(output)


def test_only_an_executed_notebook_is_written_over_and_that_is_said(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = tmp_path / f"{notebook.stem}.executed.ipynb"
    assert run(notebook) == 0 and "replaces" not in capsys.readouterr().err
    assert run(notebook) == 0
    assert f"{made.name}: an earlier run's, which this one replaces" in capsys.readouterr().err
    shutil.copyfile(notebook, made)  # the user's own
    assert run(notebook) == 2
    assert "executed.ipynb': is no executed notebook, and not written over: name" in capsys.readouterr().err
    assert made.read_bytes() == notebook.read_bytes()


def test_a_run_that_did_not_finish_is_no_success(notebook, tmp_path, capsys):
    given = ["-p", "report_to=out_of_memory", "-p", f"record={tmp_path}/s0.json"]
    assert run(notebook, *given, "--output", tmp_path / "out.ipynb") == 1
    assert "out_of_memory" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_finishes_its_record(notebook, tmp_path, number):
    command = [sys.executable, "-m", "lorakit", "run", notebook, "-p", "report_to=wait"]
    command += ["-p", f"record={tmp_path}/s0.json", "--output", tmp_path / "out.ipynb"]
    command = [str(argument) for argument in command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert "working" in process.stdout.readline()
        os.kill(process.pid, number)
        assert process.wait(60) == 1
    assert json.loads((tmp_path / "s0.json").read_text())["status"] == "interrupted"
    assert errors(tmp_path / "out.ipynb") == ["KeyboardInterrupt"]


def test_kernels_talk_over_private_sockets_even_five_at_once(tmp_path):
    path = light_notebook.write(tmp_path / "light.ipynb", body=light_notebook.CONNECTION)
    outputs = [tmp_path / f"{number}.ipynb" for number in range(5)]
    command = [sys.executable, "-m", "lorakit", "run", str(path), "--output"]
    processes = [subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL) for output in outputs]
    assert [process.wait(120) for process in processes] == [0] * 5
    connections = [json.loads(printed(output)) for output in outputs]
    assert {connection["transport"] for connection in connections} == {"ipc"}
    assert len({connection["ip"] for connection in connections}) == 5
    assert not any(Path(connection["ip"]).parent.exists() for connection in connections)  # nothing is left behind


@pytest.mark.parametrize(("asked", "told"), [(None, "plain"), ("bar", "plain"), ("none", "none")])
def test_a_kernel_s_progress_is_lines_or_nothing_where_nothing_is_asked_for(tmp_path, monkeypatch, asked, told):
    monkeypatch.delenv("LORAKIT_PROGRESS", raising=False)
    if asked:
        monkeypatch.setenv("LORAKIT_PROGRESS", asked)
    path = light_notebook.write(tmp_path / "a.ipynb", body="import os\nprint(os.environ['LORAKIT_PROGRESS'])")
    notebooks.run_notebook(path, tmp_path / "out.ipynb")
    assert printed(tmp_path / "out.ipynb").strip() == told


def test_regenerating_twice_gives_identical_files(tmp_path):
    path = light_notebook.write(tmp_path / "light.ipynb")
    notebooks.regenerate(path)
    first = path.read_bytes()
    notebooks.regenerate(path)
    assert path.read_bytes() == first
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [1, 2]
    assert b"papermill" not in first


def test_regenerating_leaves_a_broken_notebook_alone(tmp_path):
    path = light_notebook.write(tmp_path / "light.ipynb", body="print('before')\n1 / 0")
    before = path.read_bytes()
    with pytest.raises(notebooks.NotebookFailed):
        notebooks.regenerate(path)
    assert path.read_bytes() == before


def test_a_page_shows_what_a_notebook_found_and_needs_no_other_file(tmp_path):
    executed = nbformat.v4.new_notebook()
    image = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "a figure"})
    shown = nbformat.v4.new_output("stream", name="stdout", text="4 rows compared\n")
    executed.cells = [
        nbformat.v4.new_markdown_cell("# What came out"),
        nbformat.v4.new_code_cell("secret = 1", outputs=[shown, image], execution_count=1),
    ]
    nbformat.write(executed, tmp_path / "some.ipynb")
    path = notebooks.page(tmp_path / "some.ipynb")
    text = path.read_text()
    assert path == tmp_path / "some.html" and "What came out" in text and "4 rows compared" in text
    assert "data:image/png;base64,iVBORw0KGgo=" in text and "secret" not in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(https?:)?//", text)
