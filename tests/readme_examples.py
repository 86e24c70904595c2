"""The page of gates on the best examples of a larger batch, from its records: `table()`, `decided()`, `said()`."""

from __future__ import annotations

from collections.abc import Iterator

import readme_compare
from readme_records import ACCURACY, FLOPS, SCORE, TEST, WORDS, cells, difference, line, percent

from lorakit.analysis import names, stats
from lorakit.params import params_of
from lorakit.studies.gates import redundant_shares

SETTING = "sst2-minilm-redundant-example-gates"
COLUMNS = {"learning_rate": ("{:.0e}", 1), FLOPS: ("{:.2f}", 1e12), TEST: SCORE, ACCURACY: SCORE}


def rows() -> dict[str, list]:
    return stats.by_row(readme_compare.complete(SETTING))


def table() -> Iterator[str]:
    shares = redundant_shares(readme_compare.complete(SETTING))["accepted"]
    for row in rows():
        against = "" if row == "baseline" else difference(SETTING, row, "baseline", TEST)
        seen = percent(shares[row]) if row in shares else ""
        yield line(names.label(row), *cells(SETTING, row, COLUMNS), seen, against)


def decided() -> Iterator[str]:
    yield from readme_compare.verdicts(SETTING)


def said() -> Iterator[str]:
    yield from table()
    yield from decided()
    asked = params_of(SETTING, "example_loss")
    (seeds,) = {len(group) for group in rows().values()}
    size, ratio = asked["batch_size"], asked.get("gate_candidates", 4)
    yield f"the best {size} of {ratio * size} candidates"
    yield f"{asked['budget']} steps, {WORDS[seeds]} seeds"
    yield f"the best of {WORDS[len(asked['search_rates'])]} rates"
    yield f"With {percent(asked['redundancy'])} of the batches"
