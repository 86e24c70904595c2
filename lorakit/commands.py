"""`lorakit train` and `lorakit search`: a params file in, a record out, no notebook between."""

from __future__ import annotations

import argparse
import os
from typing import Any

from lorakit import params


def train(argv: list[str]) -> int:
    """Run once; exit status 0 when done, 1 when the run diverged or ran out of memory."""
    from lorakit.analysis.tables import results_table
    from lorakit.experiment import run

    record = run(_given("train", argv))
    if os.environ.get("RANK", "0") == "0":  # under `accelerate launch` one process speaks for all
        print(results_table([record]))
    if record.message:
        print(f"{record.status}: {record.message}")
    return 0 if record.status == "done" else 1


def search(argv: list[str]) -> int:
    """Search the learning rate; prints every rate's validation loss and the best."""
    from lorakit.lr_search import best_rate
    from lorakit.lr_search import search as run_search

    record = run_search(_given("search", argv))
    for point in record.search:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in (point.validation or {}).items())
        print(f"learning rate {point.learning_rate:.1e}  {point.status:9s}  {shown}")
    print(f"best: learning_rate: {best_rate(record):.1e}")
    return 0


def _given(command: str, argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog=f"lorakit {command}", description=globals()[command].__doc__)
    parser.add_argument("-f", dest="files", action="append", default=[], metavar="PARAMS.yaml", help="later files win")
    parser.add_argument(
        "-p", dest="overrides", action="append", default=[], metavar="NAME=VALUE", help="wins over files"
    )
    arguments = parser.parse_args(argv)
    return params.given(arguments.files, arguments.overrides)
