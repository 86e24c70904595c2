"""The README's run: every method on a real encoder and real sentences, a table and a figure at the end."""

from __future__ import annotations

import argparse
import os
import sys

from lorakit import assets, sweep
from lorakit.analysis import tables as table
from lorakit.places import PROJECT

SETTING = "reviews-minilm"
ASSETS = ("all-MiniLM-L6-v2", "review-sentences")


def main(argv: list[str] | None = None) -> int:
    """`lorakit demo`: fetch, run what is not finished, print the table and where to look."""
    parser = argparse.ArgumentParser(prog="lorakit demo", description=__doc__)
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument(
        "--jobs", type=int, default=cores, help="runs at once; they share the cores (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    runs = sweep.plan(PROJECT, SETTING)
    for name in ASSETS:
        assets.fetch(name)
    status = sweep.sweep(runs, arguments.jobs)
    folder = os.path.relpath(PROJECT / "results" / SETTING)
    done = [str(run.record) for run in runs if run.finished()]
    if done:
        table.main([*done, "--figure", f"{folder}/overview.png"])
        print(f"\nrecords and executed notebooks: {folder}/*/s0.*\nfigure: {folder}/overview.png", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
