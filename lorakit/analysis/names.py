"""What a row is called, which rows come first, and what they look like in every figure."""

import json
from collections.abc import Iterable, Sequence

from lorakit.files import CONFIGS
from lorakit.records import Record

# Of each row its name and its look: colour, marker and the place of its dash in `style.DASHES`. In the order of tables,
# what others are compared with first. A new row takes a look that is free and changes no other.
ROWS = json.loads((CONFIGS / "rows.json").read_text(encoding="utf-8"))
LABELS = {row: told["label"] for row, told in ROWS.items()}
LOOKS = {row: told["look"].split() for row, told in ROWS.items()}


def order(rows: Iterable[str]) -> list[str]:
    """Distinct rows, known ones first in the order of `LABELS`, then by name."""
    return sorted(set(rows), key=lambda row: ([*LABELS, row].index(row), row))


def label(row: str, records: Sequence[Record] = ()) -> str:
    """The name of a row in tables and figures: its own, where its params file says one, else `LABELS`'."""
    own = (record.resolved.get("label") for record in records if record.row == row)
    return " ".join(next(filter(None, own), LABELS.get(row, row)).split())  # a line of a table, whatever it says


def labels(records: Sequence[Record]) -> dict[str, str]:
    """Row -> its name, in the order of tables."""
    return {row: label(row, records) for row in order(record.row for record in records)}
