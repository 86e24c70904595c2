"""Figures about gates: do they keep their rate, does novelty fall, what do they cost, and when do they pay."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lorakit.analysis import names, stats, style, tables
from lorakit.analysis.curves import draw_curves, title
from lorakit.analysis.figures import draw_mean, mean_key
from lorakit.analysis.frame import frame
from lorakit.errors import require
from lorakit.records import Record

NOVELTY_GATES = ("novelty", "novelty_loss", "least_novel")  # of a record only the name is known: `scores_novelty`
SETTLED = 10  # decisions after the burn-in before a rate is drawn: one of fewer says little
PARTS = ("forward", "backward", "gate")


def gate(record: Record) -> dict[str, Any]:
    """What the record says of its gate; empty where every batch was accepted."""
    return record.details.get("gate", {})


def scored_novelty(records: Sequence[Record]) -> list[Record]:
    """Those whose gate scored novelty."""
    return [record for record in records if gate(record).get("name") in NOVELTY_GATES]


def log_points(records: Sequence[Record], key: str, after_burn_in: bool = False) -> pd.DataFrame:
    """One number of every gate's log, such as "gate/novelty": row, seed, status, candidate step x, value y.

    Args:
        after_burn_in: leave out what was logged before `SETTLED` decisions were made by the gate itself.
    """
    points = []
    for record in records:
        first = gate(record).get("burn_in", 0) + SETTLED if after_burn_in else 0
        told = [one for one in gate(record).get("log", ()) if one.get(key) is not None and one["step"] >= first]
        points += [(record.row, record.seed, record.status, float(one["step"]), float(one[key])) for one in told]
    return pd.DataFrame(points, columns=["row", "seed", "status", "x", "y"])


@style.captioned
def acceptance(records: Sequence[Record], mixed: bool = False) -> Figure:
    """The acceptance rate each gate kept after its burn-in, over candidate steps; targets as thin lines.

    The rate is the gate's own: of random batches since the burn-in, of the others of late.

    Args:
        mixed: as in `figures.loss_curve`.

    Raises:
        ParameterError: no record has a gate with a log.
    """
    points = log_points(records, "gate/acceptance_rate", after_burn_in=True)
    ax = _over_steps(records, points, "acceptance rate after the burn-in", "a gate with a log", mixed)
    targets = sorted({gate(record)["target_rate"] for record in records if "target_rate" in gate(record)})
    for target in targets:
        style.mark(ax, target, f"target {tables.percent(target)}")
    low, high = ax.get_ylim()
    ax.set_ylim(max(0, min([low, *(target - 0.05 for target in targets)])), max([high, *targets]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    return ax.get_figure()


@style.captioned
def novelty(records: Sequence[Record], mixed: bool = False) -> Figure:
    """Raw novelty of the candidate batches, before any scaling, over steps, for the gates that score it.

    Novelty is 1 - ‖Wᵀẑ‖²; thin line: 1 - k/m, what batches would have that share nothing with those accepted.

    Args:
        mixed: as in `figures.loss_curve`.

    Raises:
        ParameterError: no record has a gate that scores novelty.
    """
    scored = scored_novelty(records)
    points = log_points(scored, "gate/novelty")
    ax = _over_steps(records, points, "novelty of candidate batches", "a gate that scores novelty", mixed)
    for null in sorted({1 - gate(r)["k"] / gate(r)["m"] for r in scored if gate(r).get("k") and gate(r).get("m")}):
        style.mark(ax, null, "1 − k/m:\nunrelated\nbatches")
    ax.set_ylim(0, max([1.02, ax.get_ylim()[1]]))
    return ax.get_figure()


def _over_steps(records: Sequence[Record], points: pd.DataFrame, y: str, needed: str, mixed: bool) -> Axes:
    require(len(points) > 0, "records", sorted({record.row for record in records}), f"none of them has {needed}")
    shown = [record for record in records if (points["row"] == record.row).any()]
    with style.panel(3.1) as ax:
        band = draw_curves(ax, points, shown)
        ax.set(xlabel="candidate batches (steps)", ylabel=y, xlim=(0, None))
        title(ax, shown, mixed)
        style.legend(ax, band)
    return ax


def ledger_table(records: Sequence[Record]) -> pd.DataFrame:
    """FLOPs of each row's forwards, backwards and gate, and the share of steps accepted; means over finished runs."""
    runs = frame(records).runs
    means = runs[runs["status"] == "done"].groupby("row").mean(numeric_only=True)
    table = means[[f"flops_{part}" for part in PARTS]].set_axis([*PARTS], axis=1)
    table["accepted"] = means["accepted_steps"] / means["steps"].clip(lower=1)
    return table.reindex(names.order(table.index))


@style.captioned
def ledger(records: Sequence[Record], mixed: bool = False) -> Figure:
    """FLOPs of each row by what they were spent on, with their total and the share of batches that was accepted.

    Args:
        mixed: as in `figures.loss_curve`.

    Raises:
        ParameterError: no run finished.
    """
    table = ledger_table(records).rename(index=names.labels(records))
    require(len(table) > 0, "records", sorted({record.status for record in records}), "needs a finished run")
    tera = table[[*PARTS]] / 1e12
    pairs = zip(tera.sum(axis=1), table["accepted"], strict=True)
    with style.panel(1.0 + style.rows_height(table.index)) as ax:
        style.stacked(ax, tera, [f"{total:.3g}, {tables.percent(rate)} accepted" for total, rate in pairs], 0.24)
        ax.set_xlabel("training compute (TFLOPs)")
        title(ax, records, mixed)
        return style.legend(ax)


def redundancy_table(
    records: Sequence[Record], row: str = "slora", against: str = "random"
) -> dict[float, stats.Difference]:
    """Share of redundant batches -> validation loss of `row` minus `against` at equal accepted steps.

    Args:
        records: of one setting per share; those of other rows are not looked at.

    Raises:
        ParameterError: no share has finished pairs of both rows, or a share comes from several settings.
    """
    shares = sorted({record.resolved.get("redundancy", 0.0) for record in records})
    table = {}
    for share in shares:
        here = [record for record in records if record.resolved.get("redundancy", 0.0) == share]
        sides = [[record for record in here if record.row == name] for name in (row, against)]
        if all(sides) and (gap := stats.at_equal(*sides, "accepted_steps").gap).estimate:
            table[share] = gap
    require(len(table) > 0, "records", shares, f"have no pair of finished runs of {row!r} and {against!r}")
    return table


@style.captioned
def gain_by_redundancy(records: Sequence[Record], row: str = "slora", against: str = "random") -> Figure:
    """What novelty is worth: its loss minus that of random batches at equal accepted steps, by redundancy of the data.

    Hollow: one seed; filled: the mean with, from three seeds on, its 95 % interval. See `redundancy_table`.
    """
    table = redundancy_table(records, row, against)
    look = style.looks([row])[row]
    one, other = (names.label(name, records) for name in (row, against))
    with style.panel(2.9) as ax:
        ax.axhline(0, color="0.35", lw=0.8, zorder=1)
        for share, gap in table.items():
            draw_mean(ax, gap.differences, share, 0.015, look, upright=True)
        ax.plot([*table], [gap.estimate.mean for gap in table.values()], **look.line | {"marker": ""}, lw=0.8)
        ax.set(xlim=(-0.05, 1), xlabel="redundant batches in the stream", ylabel="difference in validation loss (nats)")
        ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.set_title(f"{one} − {other}, at equal accepted steps")
        return style.legend(ax, f"below 0: {one} is better", mean_key(look))
