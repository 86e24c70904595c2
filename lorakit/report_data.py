"""What a report compares: rows at equal cost with ungated and random runs, and every row with the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit import stats, style
from lorakit.errors import require
from lorakit.records import Record

AXES = ("accepted_steps", "tokens", "flops", "seconds")
UNGATED = ("baseline", "lora", "full_length", "same_flops")  # ordinary runs of some length: what a gate is held against
DECAYED = (
    0.95  # share of its own run from which on a run counts as finished: a linear schedule has 5 % of its rate left
)
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
    groups = stats.by_method(records)
    first = baseline or next(name for name in (*UNGATED, *groups) if name in groups)
    require(first in groups, "--baseline", first, f"must be one of {', '.join(groups)}")
    return {first: groups[first]} | groups


def gate_of(group: Sequence[Record]) -> tuple[str, float | None]:
    """The gate of a row and the acceptance rate it aims at; ("none", None) where every batch is accepted.

    Where tokens are chosen instead: "flora" or "random" with its mode, and the share of tokens.
    """
    for record in group:
        report, asked = record.details.get("gate", {}), record.resolved
        name = report.get("name", asked.get("gate", "none"))
        if name != "none":
            return name, report.get("target_rate", asked.get("gate_rate"))
        chosen = record.details.get("tokens", {}).get("gating")
        if chosen:
            return f"{chosen['method']} {chosen['mode']}", chosen["topk_tokens"]
    return "none", None


def chooses_tokens(groups: Groups) -> bool:
    """Whether the rows choose tokens, and none of them batches."""
    gates = {gate_of(group)[0] for group in groups.values()} - {"none"}
    return bool(gates) and all(" " in name for name in gates)


def _random(name: str) -> str:
    """The gate that chooses at random what `name` chooses."""
    _, space, mode = name.partition(" ")
    return f"random{space}{mode}"


def random_for(groups: Groups, row: str) -> str | None:
    """The row that chooses at random at the rate `row` aims at; None where there is none or `row` has no such gate."""
    name, rate = gate_of(groups[row])
    if name in ("none", _random(name)) or rate is None:
        return None
    for other, group in groups.items():
        kind, its_rate = gate_of(group)
        if kind == _random(name) and its_rate is not None and abs(its_rate - rate) < ROUNDING:
            return other
    return None


# at equal cost ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Validation loss of a row minus another's where both had spent as much of `axis`.

    Attributes:
        places: seed -> the x of that pair.
        shares: row -> how much of its own run it had behind it there, the least of the pairs.
        constant: neither's learning rate decays.
    """

    axis: str
    gap: stats.Difference
    places: dict[int, float]
    shares: dict[str, float]
    constant: bool = False

    @property
    def fair(self) -> bool:
        """Both runs of every pair were at the end of their own learning-rate schedule, or have none."""
        return bool(self.places) and (self.constant or self.over >= DECAYED)

    @property
    def over(self) -> float:
        """How much of its own run the row had behind it that was less far."""
        return min(self.shares.values())


def compare_at(row: Sequence[Record], other: Sequence[Record], axis: str) -> Comparison:
    """The row against another at equal `axis`, pair by pair."""
    gap, places = stats.at_equal(row, other, axis)
    shares = {}
    for group in (row, other):
        reached = stats.ends(group, axis)
        shares[group[0].method] = min((x / reached[seed] for seed, x in places.items() if reached[seed]), default=0.0)
    constant = all(record.resolved.get("schedule") == "constant" for record in (*row, *other))
    return Comparison(axis, gap, places, shares, constant)


def comparisons(groups: Groups, axis: str) -> list[Comparison]:
    """Every row against the first, and where it has a gate against random batches at its rate.

    Where a comparison with the first is of a finished run with an unfinished one, the ungated row is added that fits
    best: of which, and of the row, most of the run is over at their common x.
    """
    baseline, *rows = groups
    found = []
    for row in rows:
        found.append(compare_at(groups[row], groups[baseline], axis))
        if row not in UNGATED and not found[-1].fair:
            others = [compare_at(groups[row], groups[name], axis) for name in UNGATED if name in groups]
            best = max([found[-1], *others], key=lambda one: one.over)
            found += [best] if best.over > found[-1].over else []
        partner = random_for(groups, row)
        if partner not in (None, baseline):
            found.append(compare_at(groups[row], groups[partner], axis))
    return found


def without_random(groups: Groups) -> dict[str, float]:
    """Gated rows that have no row of random batches at their rate -> that rate."""
    gates = {row: gate_of(group) for row, group in groups.items()}
    return {
        row: rate
        for row, (name, rate) in gates.items()
        if name not in ("none", _random(name)) and rate is not None and random_for(groups, row) is None
    }


# the criterion ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Criterion:
    """Final validation loss relative to the reference's, and the least share of accepted steps saved in a pair."""

    gap: stats.Difference
    saved: float | None

    @property
    def verdict(self) -> str:
        """ "passed", "failed" or "undecided": the interval holds the limit, or there is none."""
        if self.saved is not None and self.saved < STEPS_LIMIT - ROUNDING:
            return "failed"
        mean = self.gap.estimate
        if mean is None or mean.low is None or mean.high is None:
            return "undecided"
        if mean.high <= LOSS_LIMIT + ROUNDING:
            return "passed"
        return "failed" if mean.low > LOSS_LIMIT + ROUNDING else "undecided"

    @property
    def reason(self) -> str:
        """What the verdict rests on, in a few words."""
        if self.gap.estimate is None:
            return "no seed finished in both"
        if self.saved is not None and self.saved < STEPS_LIMIT - ROUNDING:
            return "too many steps"
        if self.gap.estimate.low is None:
            return "too few seeds"
        return {"passed": "", "failed": "loss too high", "undecided": "interval holds the limit"}[self.verdict]


def reference_of(groups: Groups) -> str:
    """The row the criterion is about: the full-length one, else the baseline."""
    return "full_length" if "full_length" in groups else next(iter(groups))


def criterion(row: Sequence[Record], reference: Sequence[Record]) -> Criterion:
    """Hold a row against the reference: at most 0.5 % more validation loss at 30 % fewer accepted steps or better."""
    gap = stats.paired_differences(row, reference, "validation loss", relative=True)
    a, b = ({record.seed: record.costs.accepted_steps for record in group} for group in (row, reference))
    saved = [1 - a[seed] / b[seed] for seed in gap.seeds if b[seed]]
    return Criterion(gap, min(saved, default=None))


def label(row: str) -> str:
    """The name of a row as figures and tables show it."""
    return style.looks([row])[row].label
