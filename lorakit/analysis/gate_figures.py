"""Figures about gates: do they keep their rate, does novelty fall, what do they cost, and when do they pay.

As in `figures`, a `*_table` gives the numbers and the figure only draws them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit import stats, style
from lorakit.errors import require
from lorakit.figure_data import Curve, over_seeds
from lorakit.figures import BAND, draw_table
from lorakit.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOVELTY_GATES = ("novelty", "novelty_loss", "least_novel")  # the score they log is a novelty
SETTLED = 10  # decisions after the burn-in before a rate is drawn: one of fewer says little
PARTS = {"forward": "flops_forward", "backward": "flops_backward", "gate": "flops_gate"}


def gate(record: Record) -> dict[str, Any]:
    """What the record says of its gate; empty where every batch was accepted."""
    return record.details.get("gate", {})


def log_table(records: Sequence[Record], key: str, after_burn_in: bool = False) -> dict[str, Curve]:
    """Row -> one number of its gate's log, such as "gate/novelty", over candidate steps; rows without it are left out.

    Args:
        after_burn_in: leave out what was logged before `SETTLED` decisions were made by the gate itself.
    """
    table = {}
    for method, group in stats.by_method(records).items():
        lines = [(record, *_logged(record, key, after_burn_in)) for record in group]
        if any(len(steps) for _, steps, _ in lines):
            table[method] = over_seeds(lines)
    return table


def _logged(record: Record, key: str, after_burn_in: bool) -> tuple[np.ndarray, np.ndarray]:
    start = gate(record).get("burn_in", 0) + SETTLED if after_burn_in else 0
    points = [(p["step"], p[key]) for p in gate(record).get("log", ()) if p.get(key) is not None and p["step"] >= start]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def acceptance(records: Sequence[Record]) -> Figure:
    """The acceptance rate each gate kept after its burn-in, over candidate steps; targets as thin lines.

    The rate is the gate's own: of random batches since the burn-in, of the others of late.

    Raises:
        ParameterError: no record has a gate with a log.
    """
    table = log_table(records, "gate/acceptance_rate", after_burn_in=True)
    drawn, ax = _over_steps(records, table, "acceptance rate after the burn-in", "a gate with a log")
    targets = sorted({gate(record)["target_rate"] for record in records if "target_rate" in gate(record)})
    for target in targets:
        ax.axhline(target, color="0.35", lw=0.8, zorder=1)
        ax.annotate(f"target {100 * target:.0f} %", (1, target), (3, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", size=8)  # fmt: skip
    low, high = ax.get_ylim()
    ax.set_ylim(max(0, min([low, *(target - 0.05 for target in targets)])), max([high, *targets]))
    ax.yaxis.set_major_formatter(_percent())
    return drawn


def novelty(records: Sequence[Record]) -> Figure:
    """Raw novelty of the candidate batches, before any scaling, over steps, for the gates that score it.

    Novelty is 1 - ‖Wᵀẑ‖²; thin line: 1 - k/m, what batches would have that share nothing with those accepted.

    Raises:
        ParameterError: no record has a gate that scores novelty.
    """
    scored = [record for record in records if gate(record).get("name") in NOVELTY_GATES]
    table = log_table(scored, "gate/novelty") if scored else {}
    drawn, ax = _over_steps(scored or records, table, "novelty of candidate batches", "a gate that scores novelty")
    nulls = sorted({1 - gate(r)["k"] / gate(r)["m"] for r in scored if gate(r).get("k") and gate(r).get("m")})
    for null in nulls:
        ax.axhline(null, color="0.35", lw=0.8, zorder=1)
        ax.annotate("1 − k/m:\nunrelated\nbatches", (1, null), (3, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", size=8)  # fmt: skip
    ax.set_ylim(0, max([1.02, ax.get_ylim()[1]]))
    return drawn


def _over_steps(records: Sequence[Record], table: dict[str, Curve], y: str, needed: str) -> tuple[Figure, Axes]:
    require(len(table) > 0, "records", sorted({record.method for record in records}), f"none of them has {needed}")
    with style.context():
        drawn = style.figure(3.1)
        ax = drawn.subplots()
        draw_table(ax, table, stats.by_method(records))
        ax.set(xlabel="candidate batches (steps)", ylabel=y)
        ax.set_xlim(0, None)
        ax.set_title(records[0].setting, loc="left")
        band = any(len(curve.seeds) > 1 for curve in table.values())
        style.legend(drawn, *ax.get_legend_handles_labels(), title=BAND if band else None)
    return drawn, ax


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0, symbol=" %")


# what it cost ----------------------------------------------------------------------------------------


def ledger_table(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Row -> FLOPs of forwards, backwards and the gate, and the share of steps "accepted"; means over finished runs."""
    table = {}
    for method, group in stats.by_method(records).items():
        done = [record.costs for record in group if record.status == "done"]
        if done:
            table[method] = {part: statistics.fmean(getattr(c, name) for c in done) for part, name in PARTS.items()}
            table[method]["accepted"] = sum(c.accepted_steps for c in done) / max(1, sum(c.steps for c in done))
    return table


def gate_ledger(records: Sequence[Record]) -> Figure:
    """FLOPs of each row by what they were spent on, with their total and the share of batches that was accepted.

    Raises:
        ParameterError: no run finished.
    """
    table = ledger_table(records)
    require(len(table) > 0, "records", sorted({record.status for record in records}), "needs a finished run")
    with style.context():
        drawn = style.figure(1.0 + style.rows_height(table))
        ax = drawn.subplots()
        left = np.zeros(len(table))
        for part, color in zip(PARTS, style.shades(len(PARTS)), strict=True):
            width = np.array([row[part] for row in table.values()]) / 1e12
            ax.barh(range(len(table)), width, 0.62, left, color=color, edgecolor="white", lw=0.6, label=part)
            left += width
        for place, row in enumerate(table.values()):
            ax.annotate(f"{left[place]:.3g}, {100 * row['accepted']:.0f} % accepted", (left[place], place), (7, 0),
                        textcoords="offset points", va="center", size=8)  # fmt: skip
        style.list_methods(ax, list(table))
        ax.margins(x=0.24)
        ax.set_xlabel("training compute (TFLOPs)")
        ax.set_title(records[0].setting, loc="left")
        style.legend(drawn, *ax.get_legend_handles_labels())
    return drawn


# when it pays ----------------------------------------------------------------------------------------


def redundancy_table(
    records: Sequence[Record], method: str = "slora", against: str = "random"
) -> dict[float, stats.Difference]:
    """Share of redundant batches -> validation loss of `method` minus `against` at equal accepted steps.

    Args:
        records: of one setting per share; those of other rows are not looked at.

    Raises:
        ParameterError: no share has finished pairs of both rows, or a share comes from several settings.
    """
    shares = sorted({record.resolved.get("redundancy", 0.0) for record in records})
    table = {}
    for share in shares:
        here = [record for record in records if record.resolved.get("redundancy", 0.0) == share]
        pair = [[record for record in here if record.method == name] for name in (method, against)]
        if all(pair):
            gap, _ = stats.at_equal(*pair, "accepted_steps")
            if gap.estimate is not None:
                table[share] = gap
    require(len(table) > 0, "records", shares, f"have no pair of finished runs of {method!r} and {against!r}")
    return table


def gain_by_redundancy(records: Sequence[Record], method: str = "slora", against: str = "random") -> Figure:
    """What novelty is worth: its loss minus that of random batches at equal accepted steps, by redundancy of the data.

    Hollow: one seed; filled: the mean with, from three seeds on, its 95 % interval. See `redundancy_table`.
    """
    from matplotlib.ticker import MaxNLocator

    table = redundancy_table(records, method, against)
    looks = style.looks([method, against])
    look = looks[method]
    with style.context():
        drawn = style.figure(2.9)
        ax = drawn.subplots()
        ax.axhline(0, color="0.35", lw=0.8, zorder=1)
        for share, gap in table.items():
            _draw_gap(ax, share, gap, look)
        ax.plot([*table], [gap.estimate.mean for gap in table.values()], color=look.color, lw=0.8, ls=look.dash)
        ax.set_xlim(-0.05, 1)
        ax.xaxis.set_major_formatter(_percent())
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.set_xlabel("redundant batches in the stream")
        ax.set_ylabel("difference in validation loss (nats)")
        ax.set_title(f"{look.label} − {looks[against].label}, at equal accepted steps", loc="left")
        style.legend(drawn, *_gap_key(look), title=f"below 0: {look.label} is better")
    return drawn


def _draw_gap(ax: Axes, share: float, gap: stats.Difference, look: style.Look) -> None:
    mean = gap.estimate
    ax.plot([share + 0.015] * len(gap.seeds), gap.differences, look.marker, color=look.color, mfc="none", alpha=0.8)
    ax.plot(share, mean.mean, look.marker, color=look.color, ms=7)
    if mean.low is not None:
        ax.plot([share] * 2, [mean.low, mean.high], color=look.color, marker="_", ms=8, lw=1.4)


def _gap_key(look: style.Look) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    mean = Line2D([], [], color=look.color, marker=look.marker, ms=7)
    seed = Line2D([], [], color=look.color, ls="", marker=look.marker, mfc="none")
    return [mean, seed], ["mean, 95 % interval from three seeds on", "one seed"]
