"""`python -m benchmarks [NAME]`: list the claims with their targets, or run one and exit 1 where it is missed."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from types import ModuleType

import benchmarks
from benchmarks import _common


def names() -> list[str]:
    """The benchmarks there are: the modules of this package without a leading underscore."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name[0] != "_")


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the benchmark to run; without it, list them")
    name = parser.parse_args(argv).name
    if name is None:
        return _list()
    if name not in names():
        print(f"benchmark {name!r}: unknown; known are {', '.join(names())}", file=sys.stderr)
        return 2
    return _run(name)


def _list() -> int:
    for name in names():
        module = load(name)
        print(f"{name:10s} {module.DESCRIPTION}\n{'':10s} target: {module.TARGET}")
    return 0


def _run(name: str) -> int:
    module = load(name)
    print(f"{name}: {module.DESCRIPTION}\ntarget: {module.TARGET}\n", flush=True)
    claims = module.run()
    print(_common.table(claims))
    print(_common.last_line(name, claims))
    return 0 if all(claim.ok for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
