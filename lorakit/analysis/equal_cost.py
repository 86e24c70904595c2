"""What a report compares: rows at equal cost with ungated and random runs, and every row with the criterion."""

from collections.abc import Sequence
from typing import NamedTuple

from lorakit.analysis import stats
from lorakit.analysis.frame import gate_of
from lorakit.errors import require
from lorakit.records import Record

AXES = ("accepted_steps", "tokens", "flops", "seconds")
UNGATED = ("baseline", "lora", "full_length", "same_flops")  # ordinary runs of some length: what a gate is held against
LOSS_LIMIT, STEPS_LIMIT = 0.005, 0.30  # the criterion: at most so much more loss at so many fewer accepted steps
ROUNDING = 1e-9

Groups = dict[str, list[Record]]


def rows_of(records: Sequence[Record], baseline: str = "") -> Groups:
    """Records by row, the baseline first.

    Args:
        baseline: a row; empty: "baseline", else the first ungated row of `UNGATED`, else the first row.

    Raises:
        ParameterError: no records, several settings, two records of a row and seed, or no record of the baseline.
    """
    groups = stats.by_row(records)
    first = baseline or next(name for name in (*UNGATED, *groups) if name in groups)
    require(first in groups, "--baseline", first, f"must be one of {', '.join(groups)}")
    return {first: groups[first]} | groups


def random_for(groups: Groups, row: str) -> str | None:
    """The row that chooses at random what `row` chooses, at its rate; None: there is none, or `row` has no such gate.

    A row of random batches has itself; one that chooses examples, with no row of random ones, an ungated row.
    """
    name, rate = gate_of(groups[row])
    _, space, mode = name.partition(" ")
    for other, group in {row: groups[row], **groups}.items():
        its_name, its_rate = gate_of(group)
        if its_name == f"random{space}{mode}" and None not in (rate, its_rate) and abs(its_rate - rate) < ROUNDING:
            return other
    return next((other for other in groups if mode == "example" and other in UNGATED), None)


def comparisons(groups: Groups, axis: str) -> list[stats.Comparison]:
    """Every row against the first, and where it has a gate against random batches at its rate.

    Where a comparison with the first is of a finished run with an unfinished one, the ungated row is added that fits
    best: of which, and of the row, most of the run is over at their common x.
    """
    baseline, *rows = groups
    found: list[stats.Comparison] = []
    for row in rows:
        first = stats.at_equal(groups[row], groups[baseline], axis)
        found.append(first)
        if row not in UNGATED and not first.fair:
            others = [stats.at_equal(groups[row], groups[name], axis) for name in UNGATED if name in groups]
            best = max([first, *others], key=lambda one: min(one.shares.values()))
            found += [best] if best is not first else []
        if (partner := random_for(groups, row)) not in (None, row, baseline):
            found.append(stats.at_equal(groups[row], groups[partner], axis))
    return found


class Criterion(NamedTuple):
    """Final validation loss relative to the reference's, and the least share of accepted steps saved in a pair.

    The verdict is "passed", "failed" or "undecided"; the reason says in a few words what it rests on.
    """

    gap: stats.Difference
    saved: float | None
    verdict: str
    reason: str


def criterion(row: Sequence[Record], reference: Sequence[Record]) -> Criterion:
    """Hold a row against the reference: at most 0.5 % more validation loss at 30 % fewer accepted steps or better."""
    gap = stats.paired_differences(row, reference, stats.LOSS, relative=True)
    a, b = ({record.seed: record.costs.accepted_steps for record in group} for group in (row, reference))
    saved = min((1 - a[seed] / b[seed] for seed in gap.seeds if b[seed]), default=None)
    mean = gap.estimate
    if mean is None:
        return Criterion(gap, saved, "undecided", "no seed finished in both")
    if saved is not None and saved < STEPS_LIMIT - ROUNDING:
        return Criterion(gap, saved, "failed", "too many steps")
    if mean.low is None or mean.high is None:
        return Criterion(gap, saved, "undecided", "too few seeds")
    if mean.high <= LOSS_LIMIT + ROUNDING:
        return Criterion(gap, saved, "passed", "")
    if mean.low > LOSS_LIMIT + ROUNDING:
        return Criterion(gap, saved, "failed", "loss too high")
    return Criterion(gap, saved, "undecided", "interval holds the limit")
