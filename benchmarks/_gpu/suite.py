"""The tests that need CUDA, in a process of their own, counted."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks._gpu.comparing import MINUTES, Sizes
from lorakit.files import PROJECT

HOW = "Every test that is marked `cuda`, in a process of its own."
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def files() -> list[Path]:
    """Those with such a test: others may import what a machine with a GPU has not."""
    found = sorted((PROJECT / "tests").rglob("test_*.py"))
    return [path for path in found if "@pytest.mark.cuda" in path.read_text(encoding="utf-8")]


def run(sizes: Sizes, device: str) -> dict[str, Any]:
    """How many passed; which failed, and which were skipped (or need a package that is not there), with why."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "cuda", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *map(str, files())]
        try:
            subprocess.run(command, cwd=PROJECT, timeout=60 * MINUTES)
            return counted(ElementTree.parse(report).iter("testcase"))
        except (subprocess.TimeoutExpired, OSError, ElementTree.ParseError) as error:
            return {"passed": 0, "failed": {"pytest": type(error).__name__}, "skipped": {}}


def counted(cases: Iterable[ElementTree.Element]) -> dict[str, Any]:
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in cases:
        told = next((child for child in case if child.tag in OUTCOMES), None)
        if told is None:
            found["passed"] += 1
            continue
        raised = [line[1:].strip() for line in (told.text or "").splitlines() if line.startswith("E ")]
        why = raised[-1] if told.tag == "error" and raised else told.get("message", "")  # of a file not read: its error
        kind = "skipped" if why.startswith("ModuleNotFoundError") else OUTCOMES[told.tag]
        name = f"{case.get('classname')}::{case.get('name')}".removeprefix("::")  # a file's is in its name
        found[kind][name] = " ".join(why.split())[:200]
    return found


def said(part: dict[str, Any] | None) -> str:
    """The part's lines of the page."""
    if part is None:
        return f"Not measured: those of {', '.join(f'`{path.relative_to(PROJECT).as_posix()}`' for path in files())}."
    lines = [f"- {kind}: `{name}`: {why}" for kind in ("failed", "skipped") for name, why in part[kind].items()]
    counts = f"{part['passed']} passed, {len(part['failed'])} failed, {len(part['skipped'])} skipped."
    return "\n".join([counts, *[""] * bool(lines), *lines])
