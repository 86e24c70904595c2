"""README's table of seconds, made anew from the records of `lorakit time`: `said()`."""

from __future__ import annotations

from collections.abc import Iterator

from readme_records import line

import lorakit
from lorakit.analysis.tables import timing_table
from lorakit.files import RESULTS

SETTING = "sst2-minilm-compare"
ROWS = ("twin", "full", "head", "sparse", "hira", "qlora", "skip", "random", "slora")


def said() -> Iterator[str]:
    found = {record.row: record for record in lorakit.read_all(RESULTS / SETTING, kind="timing")}
    steps = {record.details["timing"]["steps"] for record in found.values()}
    yield f"{len(found)} networks take turns, {min(steps)} steps each" if len(steps) == 1 else "as many steps each"
    for row in ROWS:
        told = timing_table([found[row]]).iloc[0]
        name = told["method"] if row != "twin" else "LoRA once more"
        yield line(name, *(told[what] for what in ("step ×", "accepted step ×", "answer ×", "answer, merged ×")))
