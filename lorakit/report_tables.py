"""A report's tables in Markdown: what each row reached and cost, differences at equal cost, the criterion."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit import report_data, stats
from lorakit.records import Record
from lorakit.report_data import Comparison, Criterion, Groups, label
from lorakit.table import NONE, Cell, cells, layout, mean_cell, score_cell, statuses

AXES = {  # axis -> heading, divisor, format
    "accepted_steps": ("accepted steps", 1, "{:,.0f}"),
    "tokens": ("tokens", 1, "{:,.0f}"),
    "flops": ("TFLOPs", 1e12, "{:.3g}"),
    "seconds": ("seconds", 1, "{:,.1f}"),
}
UNFAIR = "†"


def quality_table(groups: Groups) -> str:
    """Runs, learning rate, final validation loss and metric of each row, with the standard deviation over seeds."""
    records = [record for group in groups.values() for record in group]
    values = dict.fromkeys(("validation loss", *metrics_of(records)))
    columns: dict[str, Cell] = {
        "row": lambda group: f"`{group[0].method}`",
        "seeds": seeds_of,
        "runs": statuses,
        "learning rate": lambda group: ", ".join(f"{rate:.3g}" for rate in distinct(group, "learning_rate")) or NONE,
    }
    return layout(cells(groups, columns | {name.replace("_", " "): score_cell(name) for name in values}), True)


def metrics_of(records: Sequence[Record]) -> list[str]:
    """What the task is judged by, on validation data and on test data."""
    metric = stats.main_value(records).partition(" ")[2]
    names = [f"{split} {metric}" for split in ("validation", "test")]
    return [name for name in names if any(stats.value_of(record, name) is not None for record in records)]


def distinct(records: Sequence[Record], parameter: str) -> list:
    """Values of a resolved parameter over `records`, each once, in the order they appear."""
    found: list = []
    for record in records:
        value = record.resolved.get(parameter)
        if value is not None and value not in found:
            found.append(value)
    return found


def seeds_of(group: Sequence[Record]) -> str:
    return ", ".join(str(record.seed) for record in group)


def cost_table(groups: Groups) -> str:
    """What each row cost and accepted, means over the runs that finished."""
    columns: dict[str, Cell] = {
        "accepted steps": mean_cell(lambda r: r.costs.accepted_steps, "{:,.0f}"),
        "steps": mean_cell(lambda r: r.costs.steps, "{:,.0f}"),
        "tokens": mean_cell(lambda r: r.costs.tokens, "{:,.0f}"),
        "TFLOPs": mean_cell(lambda r: r.costs.flops / 1e12, "{:.3g}"),
        "seconds": mean_cell(lambda r: r.costs.seconds, "{:,.1f}"),
        "accepted": mean_cell(
            lambda r: 100 * r.costs.accepted_steps / r.costs.steps if r.costs.steps else None, "{:.0f} %"
        ),
        "after burn-in": mean_cell(_late_rate, "{:.1f} %"),
        "target": _target,
    }
    return layout(cells(groups, columns), True)


def _late_rate(record: Record) -> float | None:
    rate = record.details.get("gate", {}).get("acceptance_rate")
    return None if rate is None else 100 * rate


def _target(group: list[Record]) -> str:
    rate = report_data.gate_of(group)[1]
    return NONE if rate is None else percent(rate)


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def equal_table(found: Sequence[Comparison]) -> str:
    """Differences in validation loss at an equal amount of one axis, a line per pair of rows."""
    unit = AXES[found[0].axis][0]
    head = ["row", "against", f"at {unit}", "difference", "95 % interval", "pairs", "decayed", "verdict"]
    return layout([head, *map(_equal_line, found)], True)


def _equal_line(one: Comparison) -> list[str]:
    gap = one.gap
    verdict = gap.verdict if not gap.seeds or one.fair else f"{gap.verdict} {UNFAIR}"
    difference, interval = _estimate(gap.estimate, "{:+.4f}")
    return [label(gap.method), label(gap.baseline), _places(one), difference, interval, _pairs(gap), _decayed(one),
            verdict]  # fmt: skip


def _estimate(mean: stats.Estimate | None, form: str) -> tuple[str, str]:
    if mean is None:
        return NONE, NONE
    if mean.low is None or mean.high is None:
        return form.format(mean.mean), NONE
    return form.format(mean.mean), f"[{form.format(mean.low)}, {form.format(mean.high)}]"


def _places(one: Comparison) -> str:
    """The x of the pairs, from the smallest to the largest."""
    _, size, form = AXES[one.axis]
    found = sorted(one.places.values())
    texts = [form.format(x / size) for x in (found[0], found[-1])] if found else [NONE]
    return " to ".join(dict.fromkeys(texts))


def _pairs(gap: stats.Difference) -> str:
    left_out = f" (without seed {', '.join(map(str, gap.left_out))})" if gap.left_out else ""
    return f"{len(gap.seeds)}{left_out}"


def _decayed(one: Comparison) -> str:
    if not one.places:
        return NONE
    if one.constant:
        return "constant rate"
    late = [f"{label(row)} at {int(100 * x)} %" for row, x in one.shares.items() if x < report_data.DECAYED]
    return f"no: {', '.join(late)}" if late else "yes"


def criterion_table(found: Sequence[Criterion]) -> str:
    """Each row held against the reference: relative loss with its interval, steps saved, verdict."""
    head = ["row", "validation loss, relative", "95 % interval", "pairs", "fewer accepted steps", "verdict"]
    return layout([head, *map(_criterion_line, found)], True)


def _criterion_line(one: Criterion) -> list[str]:
    difference, interval = _estimate(one.gap.estimate, "{:+.2%}")
    saved = NONE if one.saved is None else percent(one.saved, 1)
    verdict = f"**{one.verdict}**" + (f" ({one.reason})" if one.reason else "")
    return [label(one.gap.method), difference, interval, _pairs(one.gap), saved, verdict]
