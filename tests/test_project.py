"""The project's own files agree with one another: one version, one list of dependencies, one set of pins."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lorakit
from lorakit.runs.notebooks import RUN_METADATA

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# imported under another name than installed
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "pydantic_core": "pydantic"}
# loaded by name, or imported by the notebooks alone
NOT_IMPORTED = {"gguf", "ipykernel"}


def requirements() -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines) if r.name != "lorakit"}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}


def imported(folder: Path) -> set[str]:
    """Top-level names of other projects' modules that the Python files under `folder` import."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    names -= set(sys.stdlib_module_names) | {"lorakit"}
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names}


def tracked() -> list[Path]:
    """Text files under version control or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_package_imports_what_it_declares_and_nothing_else():
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert imported(ROOT / "lorakit") == declared - NOT_IMPORTED


@pytest.mark.parametrize("name", sorted(requirements()))
def test_constraints_pin_every_dependency_within_its_range(name):
    assert requirements()[name].specifier.contains(pins()[name])


def test_constraints_hold_on_any_index():
    assert "+" not in pins()["torch"]  # no build of one index
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", pin) for pin in pins().values())


def test_every_dependency_says_why_it_is_here():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    reasons = text.split("## Dependencies")[1]
    assert [name for name in requirements() if not re.search(rf"(?<![\w-]){name}(?![\w-])", reasons)] == []


STACK = [
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "jupyterlab",
    "papermill",
    "matplotlib",
    "seaborn",
    "nbval",
]


@pytest.mark.parametrize(("name", "extras"), [("environment.yml", "dev"), ("environment-cuda.yml", "dev,cuda")])
def test_conda_environments_name_the_stack_and_install_the_same_package_and_pins(name, extras):
    environment = yaml.safe_load((ROOT / name).read_text())
    python, pip, *torch, packages = environment["dependencies"]
    assert environment["name"] == PROJECT["name"] and pip == "pip"
    assert python.startswith("python" + PROJECT["requires-python"])
    assert torch == ([] if "cuda" in name else [f"pytorch-cpu=={pins()['torch']}"])  # of conda-forge, without CUDA
    stack = STACK[len(torch) :]
    assert packages == {"pip": ["-c constraints.txt", *stack, f"-e .[{extras}]"]}
    assert {*STACK} <= requirements().keys()  # nothing that the package does not ask for


def test_one_version_and_a_citation_with_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == lorakit.__version__ == version("lorakit") == citation["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_console_script():
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "lorakit"]
    assert script.value == PROJECT["scripts"]["lorakit"] == "lorakit.cli:main"
    assert callable(script.load())


def test_makefile_has_its_targets_and_ci_calls_one():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "test-lax", "check", "faults", "gpu", "notebooks", "lab", "sweep", "clean"):
        (line,) = re.findall(rf"^{target}:(.*)$", makefile, re.MULTILINE)
        assert "## " in line
        assert target == "clean" or "check" in line or "$(INSTALLED)" in line  # sets up .venv
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script and script.endswith("\nmake test\n")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    forge = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert forge["jobs"]["test"]["steps"][-1] == {"run": "make test"}

    # notebooks' metadata is stripped alike by the hook and by make
    assert RUN_METADATA in (ROOT / ".pre-commit-config.yaml").read_text()


def test_tests_that_a_page_names_are_there():
    named = [(page, *found) for page in (ROOT / "docs").glob("*.md") for found in
             re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))]  # fmt: skip
    assert len(named) > 15
    for page, file, test in named:
        assert (ROOT / file).is_file(), (page.name, file)
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (page.name, test)


def test_no_path_or_host_of_one_machine():
    foreign = re.compile(r"file:/|extra-index-url|index-url|/home/\w|/root/|/Users/\w|https?://(localhost|127\.|10\.)")
    this = ROOT / "tests" / "test_project.py"
    for path in tracked():
        if path != this and path.suffix not in (".png", ".safetensors"):
            text = path.read_text(encoding="utf-8")
            found = foreign.search(text)
            assert not found, f"{path.relative_to(ROOT)}: {found.group()}"
            assert len(ROOT.parts) < 3 or f"{ROOT}/" not in text, path.relative_to(ROOT)
