"""The page of gates on the best examples of a larger batch, from its records: `table()`, `decided()`, `said()`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from itertools import chain

import readme_compare
from readme_records import ACCURACY, FLOPS, SCORE, TEST, WORDS, cells, difference, gap, line, mean, percent
from readme_records import groups as rows

from lorakit.analysis import names
from lorakit.files import PROJECT
from lorakit.params import params_of
from lorakit.studies.gates import redundant_shares

REDUNDANT, FRESH = "sst2-minilm-redundant-example-gates", "sst2-minilm-example-gates"
COLUMNS = {"learning_rate": ("{:.0e}", 1), FLOPS: ("{:.2f}", 1e12), TEST: SCORE, ACCURACY: SCORE}


@cache
def shares() -> dict[str, float]:
    """Of what a gate chose, the share that was redundant."""
    return redundant_shares([*chain(*rows(REDUNDANT).values())])["accepted"].to_dict()


def table(setting: str) -> Iterator[str]:
    known = shares()
    for row in rows(setting):
        against = "" if row == "baseline" else difference(setting, row, "baseline", TEST)
        seen = [percent(known[row]) if row in known else ""] if setting == REDUNDANT else []
        yield line(names.label(row), *cells(setting, row, COLUMNS), *seen, against)


redundant_table, fresh_table = partial(table, REDUNDANT), partial(table, FRESH)
redundant_decided, fresh_decided = (partial(readme_compare.verdicts, setting) for setting in (REDUNDANT, FRESH))


def said() -> Iterator[str]:
    for part in (redundant_table, fresh_table, redundant_decided, fresh_decided):
        yield from part()
    yield from of_both()
    yield from of_redundant()
    yield from of_fresh()


def of_both() -> Iterator[str]:
    asked = [rows(setting)["example_loss"][0].resolved for setting in (REDUNDANT, FRESH)]
    for name in ("batch_size", "gate_candidates", "budget"):
        assert asked[0][name] == asked[1][name]
    (seeds,) = {len(group) for setting in (REDUNDANT, FRESH) for group in rows(setting).values()}
    size, ratio = asked[0]["batch_size"], asked[0]["gate_candidates"]
    yield f"the best {size} of {ratio * size} candidates"
    yield f"{asked[0]['budget']:.0f} steps, {WORDS[seeds]} seeds"
    yield f"the best of {WORDS[len(params_of(REDUNDANT, 'baseline')['search_rates'])]} rates"
    yield f"Of the batches, {percent(asked[0]['redundancy'])} are drawn from {asked[0]['redundancy_pool']} rows"
    yield f"Exactly {size} of {ratio * size} have to be taken"
    for setting in (REDUNDANT, FRESH):
        planned = {path.stem for path in (PROJECT / "params" / setting).glob("[!_]*.yaml")}
        assert planned == {*rows(setting)} and [*chain(*rows(setting).values())] == readme_compare.complete(setting)


def decisions(setting: str, verdict: str) -> list[str]:
    """What was held against what, of the claims with this verdict."""
    found = readme_compare.judged(setting)
    return found[found["verdict"] == f"**{verdict}**"]["held against"].tolist()


def of_redundant() -> Iterator[str]:
    gains = sorted(-gap(REDUNDANT, row, "baseline", TEST).mean for row in rows(REDUNDANT) if row.startswith("example_"))
    yield f"by {gains[0]:.3f} to {gains[-1]:.3f} nats"
    assert decisions(REDUNDANT, "holds") == ["example_excess − baseline", "example_norm − baseline"]
    assert decisions(REDUNDANT, "refuted") == ["example_novelty − deduplicated"]
    yield f"largest loss by example − by batch is {difference(REDUNDANT, 'example_loss', 'loss_floor', TEST)}"
    yield f"novelty by example − SLoRA {difference(REDUNDANT, 'example_novelty', 'slora', TEST)}"
    known = shares()
    ours = sorted(known[row] for row in known if row.startswith("example_"))
    yield f"{percent(ours[0]).removesuffix(' %')} to {percent(ours[-1])} of what was chosen was redundant"
    yield f"{percent(known['loss_floor'])} (loss) and {percent(known['slora'])} (novelty) of what gates of batches took"
    ours, theirs = (mean(REDUNDANT, row, FLOPS) for row in ("deduplicated", "example_novelty"))
    assert round(theirs / ours) == 3
    yield f"novelty by example − each row once is {difference(REDUNDANT, 'example_novelty', 'deduplicated', TEST)}"
    best = min(rows(REDUNDANT), key=lambda row: mean(REDUNDANT, row, TEST))
    assert best == "loss_floor"


def of_fresh() -> Iterator[str]:
    equal, gates = "same_flops", [row for row in rows(FRESH) if row.startswith("example_")]
    best = min(gates, key=lambda row: mean(FRESH, row, TEST))
    assert best == "example_novelty"
    assert max(mean(FRESH, row, FLOPS) for row in (best, "example_loss")) < 1.02 * mean(FRESH, equal, FLOPS)
    ours, theirs = (mean(FRESH, row, TEST) for row in (equal, best))
    yield f"LoRA on every batch reached {ours:.3f} against {theirs:.3f} of the best gate, novelty"
    assert decisions(FRESH, "holds") == ["example_novelty − baseline"]
    assert len(decisions(FRESH, "refuted")) == len(readme_compare.judged(FRESH)) - 1
    loss = mean(FRESH, "example_loss", TEST)
    assert loss < math.log(2)
    yield f"ended at {loss:.3f}, hardly below the {math.log(2):.3f} of knowing nothing"
    right = mean(FRESH, "example_loss", ACCURACY)
    against = difference(FRESH, "example_loss", "baseline", ACCURACY)
    yield f"{100 * right:.0f} % of the answers are right, more than random examples teach ({against})"
    worst = rows(FRESH)["example_loss"][0].resolved["gate_candidates"]
    assert worst == 4 and round(5 * (1 - right)) == 1
