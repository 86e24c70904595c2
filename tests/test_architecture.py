"""The house stands: imports go down the floors, in no circle; analysis without torch, training without a method."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# a room may import from its own floor and from those above it in this list
FLOORS = [
    ("errors", "files", "quiet", "progress", "fields"),
    ("settings", "params", "records", "seams", "modules", "head", "assets"),
    ("base", "sketches", "tasks", "analysis"),
    ("adapters", "models", "scratch"),
    ("skip", "tokens"),
    ("gates",),
    ("measure",),
    ("training",),
    ("runs",),
    ("cli", "studies", "__main__", "__init__"),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOORS = ("lorakit.training.slora", "lorakit.training.flora", "lorakit.training")  # the last re-exports the two
SEAMS_OF_GATES = ("lorakit.gates.log", "lorakit.gates.look")  # what any gate's decisions are kept in and looked at by
METHODS = ("lorakit.adapters", "lorakit.base", "lorakit.skip", "lorakit.tokens", "lorakit.gates")


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of everything in the package."""
    found = {}
    for path in sorted((root / "lorakit").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere, in functions and for types too."""
    known = modules(root)
    return {name: _imported(path.read_text(), known) - {name} for name, path in known.items()}


def _imported(text: str, known: dict[str, Path]) -> set[str]:
    named: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= {name if name in known else node.module for name in inner}
    return {name for name in named if name in known}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def upward(graph: dict[str, set[str]]) -> list[str]:
    pairs = [(one, other) for one, others in graph.items() for other in others if one != "lorakit"]
    return [f"{one} -> {other}" for one, other in sorted(pairs) if FLOOR[room(one)] < FLOOR[room(other)]]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of modules, where there is any; a package that names its own modules' public names is none."""
    inner = {one: {o for o in others if not one.startswith(f"{o}.")} for one, others in graph.items()}
    try:
        list(TopologicalSorter(inner).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def importers(graph: dict[str, set[str]], folder: str) -> list[str]:
    inside = f"lorakit.{folder}"
    return [o for o, names in graph.items() if not o.startswith(inside) and any(n.startswith(inside) for n in names)]


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, left = set(), [start]
    while left:
        if (name := left.pop()) not in seen:
            seen.add(name)
            left += [*graph[name], *(name.rpartition(".")[0],) * (name.count(".") > 1)]
    return seen


def torch_under(root: Path, graph: dict[str, set[str]], folder: str) -> list[str]:
    """Modules that `folder` needs and that import torch, however late."""
    known, found = modules(root), set()
    for module in graph:
        if module.startswith(f"lorakit.{folder}"):
            found |= {name for name in reached(graph, module) if _names_torch(known[name])}
    return sorted(found)


@cache
def _names_torch(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] in ("torch", "transformers", "peft", "accelerate") for name in names)


def methods_in_training(graph: dict[str, set[str]]) -> list[str]:
    """What `training/`, but for its public doors, imports of a method's room; and who in it imports a door."""
    found = []
    for one, others in graph.items():
        if one.startswith("lorakit.training") and one not in DOORS:
            found += [f"{one} -> {other}" for other in sorted(others) if _is_a_method(other) or other in DOORS[:2]]
    return found


def _is_a_method(module: str) -> bool:
    return module.startswith(METHODS) and module not in SEAMS_OF_GATES


RULES = {
    "floors": upward, "circle": circle, "studies": lambda graph: importers(graph, "studies"),
    "torch": lambda graph: torch_under(ROOT, graph, "analysis"), "methods": methods_in_training,
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_house_stands(rule):
    """Imports go down the floors, in no circle; none of a study, of torch under analysis, of a method in training."""
    assert RULES[rule](imports()) == []


def test_the_root_is_small_and_files_are_short():
    assert len(list((ROOT / "lorakit").glob("*.py"))) <= 13
    assert [n for n, path in modules(ROOT).items() if len(path.read_text().splitlines()) > 300] == []
    tests = [path.name for path in (ROOT / "tests").rglob("*.py") if len(path.read_text().splitlines()) > 400]
    assert tests == []


def test_the_code_fingerprint_is_of_what_a_run_executes():
    from lorakit.measure.environment import executed

    graph, known = imports(), modules(ROOT)
    needed = reached(graph, "lorakit.runs.experiment") | reached(graph, "lorakit.runs.search")
    hashed = {f"lorakit/{name}" for name in executed(ROOT / "lorakit")}
    assert {known[name].relative_to(ROOT).as_posix() for name in needed} <= hashed
    assert not any(name.startswith(("lorakit/analysis", "lorakit/studies", "lorakit/cli")) for name in hashed)


@pytest.fixture
def house(tmp_path):
    """A small one of sound modules, and how to add a line to it."""
    files = {
        "errors": "", "seams": "import torch", "records": "from lorakit.errors import LorakitError",
        "analysis/frame": "from lorakit import records", "gates/random": "from lorakit.seams import Gate",
        "training/gated": "from lorakit import seams", "studies/gates": "from lorakit.analysis import frame",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "lorakit" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        (path.parent / "__init__.py").touch()

    def with_line(name: str, line: str) -> dict[str, set[str]]:
        path = tmp_path / "lorakit" / f"{name}.py"
        path.write_text(f"{path.read_text()}{line}\n")
        return imports(tmp_path)

    return with_line


@pytest.mark.parametrize(
    ("rule", "module", "line", "named"),
    [("floors", "records", "from lorakit.gates import random", "lorakit.records -> lorakit.gates.random"),
     ("floors", "records", "def f():\n    import lorakit.gates.random", "lorakit.records -> lorakit.gates.random"),
     ("floors", "records", "if T:\n    import lorakit.gates.random", "lorakit.records -> lorakit.gates.random"),
     ("circle", "errors", "def late():\n    from lorakit.records import Record", "lorakit.records"),
     ("studies", "training/gated", "from lorakit.studies import gates", "lorakit.training.gated"),
     ("torch", "records", "from lorakit import seams", "lorakit.seams"),
     ("methods", "training/gated", "from lorakit.gates.random import R", "lorakit.gates.random")],
)  # fmt: skip
def test_a_breach_is_seen(house, tmp_path, monkeypatch, rule, module, line, named):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert RULES[rule](house(module, "")) == []
    assert named in " ".join(RULES[rule](house(module, line)))
