"""The site's pages about the package: which names stand on which page; mkdocstrings adds signatures and docstrings.

Modules are read, not imported.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import lorakit

PROJECT = Path(__file__).parents[1]


def pages() -> dict[str, str]:
    """A page for each public module, and one for the names that `lorakit` itself offers."""
    modules = dict(sorted(lorakit._MODULES.items()))
    shown = {module: members(f"lorakit.{path}") for module, path in modules.items()}
    home = {path: module for module, found in shown.items() for path in found}
    found = {f"api/{module}.md": _page(module, path, shown[module], home) for module, path in modules.items()}
    lines, others = [], []
    for name, module in sorted(lorakit._PUBLIC.items()):
        path = defined(f"lorakit.{module}", name)
        if path is None:  # a value, not a thing with a docstring
            lines.append(f"- `lorakit.{name}`")
            continue
        others += [path] if path not in home else []
        lines.append(f"- [`lorakit.{name}`][{path}]")
    parts = ["# lorakit", "What `import lorakit` offers; each is imported when it is first used.", "\n".join(lines)]
    parts += [f"::: {path}" for path in dict.fromkeys(others)]
    parts += ["## Modules", "\n".join(f"- [`lorakit.{module}`]({module}.md)" for module in modules)]
    return found | {"api/index.md": "\n\n".join(parts) + "\n"}


def _page(module: str, path: str, found: list[str], home: dict[str, str]) -> str:
    parts = [f"# lorakit.{module}", _docstring(f"lorakit.{path}")]
    for one in found:
        elsewhere = home[one] != module
        parts.append(f"- [`{one.rpartition('.')[2]}`][{one}]" if elsewhere else f"::: {one}")
    return "\n\n".join(parts) + "\n"


def members(module: str) -> list[str]:
    """Where a module's public functions and classes are defined, in its order; of a package those it imports too."""
    tree, found = _tree(module), []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and _is_package(module) and node.module.startswith("lorakit."):
            found += [defined(node.module, alias.name) for alias in node.names]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(f"{module}.{node.name}")
    return [path for path in dict.fromkeys(found) if path and not path.rpartition(".")[2].startswith("_")]


def defined(module: str, name: str) -> str | None:
    """The full name under which `name`, as found in `module`, is defined; None unless it is a function or a class."""
    for node in _tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return f"{module}.{name}"
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            (alias,) = [alias for alias in node.names if (alias.asname or alias.name) == name]
            return defined(node.module, alias.name) if node.module.startswith("lorakit") else None
    return None


def _path(module: str) -> Path:
    place = PROJECT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _is_package(module: str) -> bool:
    return _path(module).name == "__init__.py"


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _docstring(module: str) -> str:
    return ast.get_docstring(_tree(module)) or ""
