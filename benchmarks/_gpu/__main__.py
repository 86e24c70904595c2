"""Measure what is claimed of a GPU on the one that is there: in parts, each written whole; then the page of all."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import today, write_json
from benchmarks._gpu import memory, page, suite, times
from benchmarks._gpu.comparing import REAL, TINY, Sizes, gib, tried
from lorakit.errors import LorakitError, require
from lorakit.files import require_place, write_text
from lorakit.measure.environment import environment

PARTS: dict[str, Callable[[Sizes, str], dict[str, Any]]] = {
    "tests": suite.run,
    "memory": lambda sizes, device: tried(memory.comparisons(sizes, device), sizes, device),
    "time": lambda sizes, device: tried(times.comparisons(sizes, device), sizes, device),
}
NOTHING_MEASURED = 3  # exit status
QUERIED = {"driver": "driver_version", "clock": "clocks.sm", "highest clock": "clocks.max.sm", "power": "power.limit"}

OTHERS = ("trl", "liger-kernel", "flash-attn")  # packages that some comparisons need


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a claim was missed or something failed, 2 where the command is wrong, 3 where there is no CUDA."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._gpu", description=__doc__)
    parser.add_argument("--part", default="", help=f"{', '.join(PARTS)} or page; left out: all of them")
    parser.add_argument("--again", action="store_true", help="measure a part anew that is there")
    parser.add_argument("--rehearse", metavar="FOLDER", type=Path, help="tiny sizes, any device; all goes to FOLDER")
    args = parser.parse_args(argv)
    try:
        return _run(args.part, args.again, args.rehearse)
    except LorakitError as error:
        print(error, file=sys.stderr)
        return 2


def _run(part: str, again: bool, rehearsed: Path | None) -> int:
    require(part in ("", "page", *PARTS), "PART", part, f"must be one of {', '.join(PARTS)}, page; left out: all")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not rehearsed and part != "page":
        print("no CUDA device: nothing was measured (--rehearse FOLDER tries it without one)", file=sys.stderr)
        return NOTHING_MEASURED
    folder, goal = (rehearsed, rehearsed / "gpu.md") if rehearsed else (page.RECORDS, page.PAGE)
    ours = {page.RECORDS.resolve(), page.PAGE.parent.resolve()}
    require(not rehearsed or not ours & {rehearsed.resolve(), *rehearsed.resolve().parents}, "--rehearse",
            str(rehearsed), "is where what was measured lies; name another folder")  # fmt: skip
    require_place(goal)
    ok = all([_measured(name, folder, device, again, bool(rehearsed)) for name in PARTS if part in ("", name)])
    if part in ("", "page"):
        write_text(page.page(page.records(folder)), goal)
        print(f"{goal}: written")
    return 0 if ok else 1


def _measured(name: str, folder: Path, device: str, again: bool, rehearsed: bool) -> bool:
    """Add a part to the card's record, unless it is there; whether nothing in it failed or was missed."""
    card = "rehearsal" if rehearsed else torch.cuda.get_device_name(0)
    path = folder / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"card": card, "parts": {}}
    if name in record["parts"] and not again:
        print(f"{name}: there already ({path}); AGAIN=1 or --again measures it anew")
        return True
    require_place(path)  # before minutes are spent
    sizes = TINY if rehearsed else REAL
    part = {"date": today(), **PARTS[name](sizes, device), "machine": machine(device)}
    write_json(record | {"rehearsal": rehearsed, "parts": record["parts"] | {name: part}}, path)
    failed = part.get("failed") or [why for why in part.get("not_measured", {}).values() if why.startswith("failed")]
    return not failed and (rehearsed or all(claim["ok"] for claim in part.get("claims", [])))


def machine(device: str) -> dict[str, Any]:
    """Versions and device; of a card its memory, and what nvidia-smi says right after the measurements, if it does."""
    found = environment()
    others = {name: next((d.version for d in distributions(name=name)), None) for name in OTHERS}
    gpu = {"memory": f"{gib():.0f} GiB", "CUDA": found["cuda"], **_queried()} if device == "cuda" else {}
    return found | {"versions": found["versions"] | others, "gpu": gpu}


def _queried() -> dict[str, str]:
    query = [f"--query-gpu={','.join(QUERIED.values())}", "--format=csv,noheader"]
    try:
        command = ["nvidia-smi", "-i", f"GPU-{torch.cuda.get_device_properties(0).uuid}", *query]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (AttributeError, OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERIED, (value.strip() for value in told.split(",")), strict=False))


if __name__ == "__main__":
    sys.exit(main())
