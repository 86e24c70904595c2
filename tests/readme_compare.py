"""README's tables of the comparison that is being run, from its records: `verdicts()`, `table()`, `said()`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from readme_records import WORDS, line

import lorakit
from lorakit.analysis import claims, fronts, stats
from lorakit.files import PROJECT, RESULTS
from lorakit.params import params_of

SETTING = "sst2-minilm-compare"
WHAT = {"trainable": "trained parameters", "flops": "FLOPs", "flops_backward": "the backward's FLOPs"}


@functools.cache
def complete(setting: str = SETTING) -> list[lorakit.Record]:
    """The runs of rows that have all planned seeds."""
    runs = stats.by_row(lorakit.read_all(RESULTS / setting))
    (planned,) = {len(claim.seeds) for claim in claims.read_claims(setting=setting)}
    return [run for group in runs.values() for run in group if len(group) == planned]


def judged(setting: str = SETTING):
    found = claims.claims_table(claims.read_claims(setting=setting), complete(setting))
    return found[~found["verdict"].str.startswith(("no finished run", "too few"))]


def verdicts(setting: str = SETTING) -> Iterator[str]:
    columns = ["claim", "held against", "what", "seen", "limit", "verdict"]
    for source, pair, what, *cells in judged(setting)[columns].itertuples(index=False):
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
    assert rows == {*all_rows}
    yield f"all {len(rows)} rows"
    seeds = {len(group) for group in stats.by_row(complete()).values()}
    yield f"{WORDS[seeds.pop()]} seeds"
    yield "means with 95 % intervals"
    yield from of_slora()
    yield from of_qlora()


def of_slora() -> Iterator[str]:
    rows = stats.by_row(complete())
    slora, full = (rows[row] for row in ("slora", "full_length"))
    ours, theirs = (sum(run.costs.flops for run in runs) for runs in (slora, full))
    yield f"({full[0].resolved['budget']:.0f} steps of LoRA, "
    yield f"for {theirs / ours:.1f} times SLoRA's FLOPs"
    pairs = zip(*(sorted(runs, key=lambda run: run.seed) for runs in (slora, full)), strict=True)
    ratios = [a.final["validation"]["loss"] / b.final["validation"]["loss"] for a, b in pairs]
    lost = 100 * (sum(ratios) / len(ratios) - 1)
    (limit,) = (row.limit for row in judged().itertuples() if "at most 0.5 % more loss" in row.claim)
    assert float(limit.removeprefix("≤ ")) == 1.005
    yield f"cost it {lost:.0f} % of loss, and the claim of at most 0.5 % is refuted"
    rates = {rows[row][0].resolved["learning_rate"] for row in ("lora_rank2", "lora", "lora_rank32")}
    ranks = [rows[row][0].resolved["rank"] for row in ("lora_rank2", "lora_rank32", "lora")]
    assert len(rates) == 1
    yield "Rank {} is behind by less than the claim's margin, rank {} is where rank {} is".format(*ranks)


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
