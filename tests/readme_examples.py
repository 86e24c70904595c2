"""The page of gates on the best examples of a larger batch, from its records: `table()`, `decided()`, `said()`."""

from __future__ import annotations

from collections.abc import Iterator

import readme_compare
from readme_records import ACCURACY, FLOPS, SCORE, TEST, WORDS, cells, difference, gap, line, mean, percent

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
    asked = rows()["example_loss"][0].resolved
    (seeds,) = {len(group) for group in rows().values()}
    size, ratio = asked["batch_size"], asked["gate_candidates"]
    yield f"the best {size} of {ratio * size} candidates"
    yield f"{asked['budget']:.0f} steps, {WORDS[seeds]} seeds"
    yield f"the best of {WORDS[len(params_of(SETTING, 'baseline')['search_rates'])]} rates"
    yield f"Of the batches, {percent(asked['redundancy'])} are drawn from {asked['redundancy_pool']} rows"
    loss, novelty = (-gap(SETTING, f"example_{score}", "baseline", TEST).mean for score in ("loss", "novelty"))
    yield f"by {loss:.3f} nats (largest loss) and {novelty:.3f} (novelty)"
    yield f"largest loss by example − by batch is {difference(SETTING, 'example_loss', 'loss_floor', TEST)}"
    shares = redundant_shares(readme_compare.complete(SETTING))["accepted"]
    yield f"Exactly {size} of {ratio * size} have to be taken, so {percent(shares['example_loss'])} of what was chosen"
    yield f"against {percent(shares['loss_floor'])} of what the gate of whole batches took"
    assert {*shares.index} >= {"example_loss", "loss_floor"}
    ours, theirs = (mean(SETTING, row, FLOPS) for row in ("deduplicated", "example_novelty"))
    assert round(theirs / ours) == 3
    yield f"novelty by example − each row once is {difference(SETTING, 'example_novelty', 'deduplicated', TEST)}"
    held = readme_compare.judged(SETTING)
    assert held[held["verdict"] == "**refuted**"]["held against"].tolist() == ["example_novelty − deduplicated"]
