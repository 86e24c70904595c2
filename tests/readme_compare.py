"""README's tables of the comparison that is being run, from its records: `verdicts()`, `table()`, `said()`."""

from __future__ import annotations

from collections.abc import Iterator

from readme_records import WORDS, line

import lorakit
from lorakit.analysis import claims, fronts, stats
from lorakit.files import PROJECT, RESULTS
from lorakit.params import params_of

SETTING = "sst2-minilm-compare"
WHAT = {"trainable": "trained parameters", "flops": "FLOPs", "flops_backward": "the backward's FLOPs"}


def complete() -> list[lorakit.Record]:
    """The runs of rows that have all planned seeds."""
    runs = stats.by_row(lorakit.read_all(RESULTS / SETTING))
    (planned,) = {len(claim.seeds) for claim in claims.read_claims(setting=SETTING)}
    return [run for group in runs.values() for run in group if len(group) == planned]


def judged():
    found = claims.claims_table(claims.read_claims(setting=SETTING), complete())
    return found[~found["verdict"].str.startswith(("no run", "too few"))]


def verdicts() -> Iterator[str]:
    columns = ["claim", "held against", "what", "seen", "limit", "verdict"]
    for source, pair, what, *cells in judged()[columns].itertuples(index=False):
        what = WHAT.get(what, what.replace("_", " "))
        yield line(source, f"`{pair}`", what, *(cell.replace("-0", "−0") for cell in cells))


def table() -> Iterator[str]:
    told, loss = (fronts.standings_table(complete(), value) for value in ("test accuracy", "test loss"))
    for row in told.index:
        name, seeds, accuracy, standing, *costs = told.loc[row]
        yield line(name, accuracy, standing, loss.loc[row, "test loss"], *(cost.rstrip(" *") for cost in costs))


def said() -> Iterator[str]:
    yield from verdicts()
    yield from table()
    rows = {run.row for run in complete()}
    all_rows = [path.stem for path in (PROJECT / "params" / SETTING).glob("*.yaml") if not path.stem.startswith("_")]
    given = params_of(SETTING, "lora")
    yield f"{given['budget']} steps of {given['batch_size']} sentences"
    yield f"the best of {WORDS[len(given['search_rates'])]} rates"
    yield f"{WORDS[len(rows)]} of {WORDS[len(all_rows)] if len(all_rows) < len(WORDS) else len(all_rows)} rows"
    seeds = {len(group) for group in stats.by_row(complete()).values()}
    yield f"{WORDS[seeds.pop()]} seeds"
    yield "means with 95 % intervals"
    yield from of_qlora()


def of_qlora() -> Iterator[str]:
    runs, lora = (stats.by_row(complete())[row] for row in ("qlora", "lora"))
    scores = {run.seed: run.final["test"]["accuracy"] for run in runs}
    (lost,) = (run for run in runs if scores[run.seed] < 0.6)
    kept = [score for seed, score in scores.items() if seed != lost.seed]
    spent = [point.train_loss for point in lost.curve if point.step > 20]
    spike = [max(point.train_loss for point in run.curve) for run in (lost, *lora) if run.seed == lost.seed]
    assert min(spike) > 1 and {run.resolved["learning_rate"] for run in (*runs, *lora)} == {3e-3}
    theirs = [run.final["test"]["accuracy"] for run in lora]
    ends = [f"at {min(side):.3f} to {max(side):.3f}" for side in (kept, theirs)]
    yield f"{WORDS[len(kept)]} of {WORDS[len(runs)]} end {ends[0]}, LoRA's {ends[1]}; seed {lost.seed}"
    ended = f"and ended at {scores[lost.seed]:.3f}"
    yield f"its training loss {sum(spent) / len(spent):.2f} on average from then on, {ended}"
    peaks = [group[0].costs.predicted_memory["peak"] for group in (runs, lora)]
    yield f"four bits take {100 * (1 - peaks[0] / peaks[1]):.0f} % off its peak"
