"""From a wheel alone, in an empty folder: a working folder is laid out, a sweep runs, notebooks find records."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import light_notebook
import pytest

from lorakit.records import read

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this checkout, unpacked; gives a function that runs `lorakit …` from it in a folder."""
    made, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    built = made / "source"  # setuptools builds beside the sources: not beside those that other tests read
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (built / name).parent.mkdir(parents=True, exist_ok=True)
            (built / name).symlink_to(ROOT / name)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", made, built]
    subprocess.run([sys.executable, *build], check=True)
    [wheel] = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def lorakit(folder: Path, *argv: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("LORAKIT_HOME", None)
        command = [sys.executable, "-m", "lorakit", *argv]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    lorakit.site = site
    return lorakit


def parts(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of what `lorakit init` is to lay out, as the checkout has it under version control."""
    asked = ["Snakefile", "claims.yaml", "notebooks", "params", "profiles", "results", "benchmarks/measured"]
    listed = subprocess.run(["git", "ls-files", "-z", *asked], cwd=folder, capture_output=True, check=True)
    return {name: (folder / name).read_bytes() for name in listed.stdout.decode().split("\0") if name}


def test_a_working_folder_holds_what_the_project_holds_and_is_the_users(installed, tmp_path):
    done = installed(tmp_path, "init", "mine")
    assert done.returncode == 0 and done.stdout.startswith("mine: yours.") and not done.stderr
    expected, folder = parts(ROOT), tmp_path / "mine"
    laid = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert expected.items() <= laid.items()
    (folder / "params" / "toy" / "own.yaml").write_text("rank: 2\n")  # files of theirs to change
    again = installed(tmp_path, "init", "mine")
    assert again.returncode == 2 and "FOLDER='mine': not empty, it holds " in again.stderr
    assert (folder / "params" / "toy" / "own.yaml").read_text() == "rank: 2\n"
    there = installed(folder / "notebooks", "sweep", "--setting", "toy", "--methods", "none-such")
    assert there.returncode == 2 and "own" in there.stderr  # found from a folder below, as a notebook is opened there


@pytest.mark.parametrize("inside", [True, False])
def test_init_refuses_a_file_and_the_project_itself(installed, tmp_path, inside):
    (tmp_path / "taken").write_text("mine")
    wrong = installed.site / "lorakit" / "project" / "new" if inside else tmp_path / "taken"
    done = installed(tmp_path, "init", str(wrong))
    assert done.returncode == 2 and f"FOLDER='{wrong}'" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "taken").read_text() == "mine" and not (installed.site / "lorakit/project/new").exists()


READS = """
import lorakit
print("recorded:", len(lorakit.read_all(lorakit.RESULTS / "sst2-minilm")), "results in:", lorakit.RESULTS)
"""


def test_a_sweep_in_an_empty_folder_reads_what_the_package_brings_and_writes_there(installed, tmp_path):
    project = installed.site / "lorakit" / "project"
    light_notebook.write(project / "notebooks" / "01_lora.ipynb", body=light_notebook.BODY + READS)
    done = installed(tmp_path, "sweep", "--setting", "toy", "--methods", "head")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "results" / "toy" / "head"
    assert read(place / "s0.json").status == "done" and read(place / "s0.json").setting == "toy"
    count = len(list((ROOT / "results" / "sst2-minilm").glob("*/s*.json")))
    assert f"recorded: {count} results in: {tmp_path / 'results'}" in light_notebook.printed(place / "s0.ipynb")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".runs", ".snakemake", "results"]
    assert not (project / ".runs").exists()


def test_a_folder_called_params_is_no_working_folder(installed, tmp_path):
    (tmp_path / "params").mkdir()
    done = installed(tmp_path, "sweep", "--setting", "no-such")
    assert done.returncode == 2 and "must be one of alpaca-llama" in done.stderr
    shipped = installed(tmp_path, "table", "results/sst2-minilm")  # read from what the package brings
    assert shipped.returncode == 0 and "QLoRA" in shipped.stdout
