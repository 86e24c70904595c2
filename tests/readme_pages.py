"""The pages whose numbers are held to records and benchmarks: README, and those of `docs/` that its results moved to.

One list for who writes the tables (`scripts/readme.py`) and who holds them (`tests/test_readme.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorakit.files import PROJECT

# page -> its sections that are held; none named: the whole page
HELD: dict[str, tuple[str, ...]] = {
    "README.md": ("First results",),
    "docs/first_results.md": (),
    "docs/batches.md": (),
    "docs/tokens.md": (),
    "docs/not_true.md": (),
    "docs/benchmarks.md": (),
}


def read() -> dict[str, str]:
    """Each page's text, by its name from the project's folder."""
    return {name: (PROJECT / name).read_text(encoding="utf-8") for name in HELD}


def results(pages: Mapping[str, str]) -> str:
    """What is held of these pages, in one line."""
    held = []
    for name, titles in HELD.items():
        sections = dict(section.split("\n", 1) for section in re.split(r"^## ", pages[name], flags=re.M)[1:])
        held += [sections[title] for title in titles] or [pages[name]]
    return " ".join(" ".join(held).split())
