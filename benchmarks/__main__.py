"""`python -m benchmarks [NAME …]`: list the claims with their targets, or run some and exit 1 where one is missed."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
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
    parser.add_argument("names", nargs="*", metavar="NAME", help="the benchmarks to run; without one, list them")
    parser.add_argument("--save", metavar="FOLDER", type=Path, help="write what was measured to FOLDER/NAME.json")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in names()]:
        print(f"benchmark {unknown[0]!r}: unknown; known are {', '.join(names())}", file=sys.stderr)
        return 2
    if not args.names:
        return _list()
    if len(args.names) > 1:  # each in a process of its own: what one leaves of the heap would be measured in the next
        save = ["--save", args.save] if args.save else []
        return max(abs(subprocess.call([sys.executable, "-m", "benchmarks", name, *save])) for name in args.names)
    return _run(args.names[0], args.save)


def _list() -> int:
    for name in names():
        module = load(name)
        print(f"{name:10s} {module.DESCRIPTION}\n{'':10s} target: {module.TARGET}")
    return 0


def _run(name: str, folder: Path | None) -> int:
    from lorakit.files import require_place

    path = folder and folder / f"{name}.json"
    if path:
        require_place(path, "--save")  # before minutes are spent
    module = load(name)
    print(f"{name}: {module.DESCRIPTION}\ntarget: {module.TARGET}\n", flush=True)
    claims = module.run()
    print(_common.table(claims))
    print(_common.last_line(name, claims))
    if path:
        _common.save(name, claims, path)
    return 0 if all(claim.ok for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
