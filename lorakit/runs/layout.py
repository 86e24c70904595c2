"""`lorakit init FOLDER`: the project's notebooks, params files and records laid out as a folder that is the user's."""

import shutil
from pathlib import Path

# what a wheel holds besides the package (`setup.py` runs this file), and a working folder has
PARTS = ("Snakefile", "claims.yaml", "notebooks", "params", "profiles", "results", "benchmarks/measured")


def lay_out(source: Path, target: Path) -> None:
    """Copy every part of `source` into `target`, without what a run or JupyterLab left there."""
    for part in PARTS:
        there, to = source / part, target / part
        if there.is_dir():
            executed = ["s*.ipynb", "compare.*"] if part == "results" else []
            shutil.copytree(there, to, ignore=shutil.ignore_patterns(".*", "__pycache__", *executed))
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there, to)


def main(argv: list[str] | None = None) -> int:
    """Lay out a working folder: notebooks to open in JupyterLab, params files to change, the records behind them."""
    import argparse

    from lorakit.errors import require
    from lorakit.files import PROJECT, require_empty, written

    parser = argparse.ArgumentParser(prog="lorakit init", description=main.__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="new or empty")
    folder = parser.parse_args(argv).folder.expanduser()
    require_empty(folder, "FOLDER")
    require(not folder.resolve().is_relative_to(PROJECT.resolve()), "FOLDER", str(folder), f"is inside {PROJECT}")
    with written(folder, folder=True) as made:
        lay_out(PROJECT, made)
    print(f"{folder}: yours. There `jupyter lab notebooks`, `lorakit sweep --setting toy` (of lorakit[lab,sweep])")
    return 0
