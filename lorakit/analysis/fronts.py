"""What rows bought against what they cost: which no other row beats in both, and which of them fit a case."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lorakit.analysis import names, stats, style
from lorakit.analysis.curves import title
from lorakit.analysis.figures import draw_mean, mean_key
from lorakit.analysis.frame import frame, require_comparable
from lorakit.analysis.tables import NONE, PEAK, TRAINABLE, Table, axis_columns, score
from lorakit.errors import require
from lorakit.records import METRICS, Record

COSTS = axis_columns("flops") | PEAK | TRAINABLE


def front(costs: Sequence[float], values: Sequence[float], higher: bool) -> np.ndarray:
    """Which of the points (N,) no other beats: none costs as little and is as good, and better in one of both.

    Args:
        higher: whether more of `values` is better. What has no finite number is never on the front.
    """
    points = np.column_stack([np.asarray(costs, float), np.asarray(values, float) * (-1 if higher else 1)])
    beaten = (points[:, None] >= points).all(2) & (points[:, None] > points).any(2)  # (N, N): the first by the second
    known = np.isfinite(points).all(1)
    return known & ~(beaten & known).any(1)


def standings(records: Sequence[Record], value: str = "") -> pd.DataFrame:
    """A line per row with finished runs: label, seeds, mean, low and high of `value`, its costs' means, and `standing`.

    That is to the row with the best mean (of those with the most seeds), over `common` seeds, by Student's paired test
    (of perplexities' logarithms) with Holm's correction over all rows: "best", "worse", "better" (of other seeds than
    the means are of), "within noise" or "too few seeds". The best was chosen by the same runs, which favours it.

    Args:
        value: "test accuracy", …; empty: what the task is judged by.

    Raises:
        ParameterError: no finished run has `value`, or nobody knows which way of it is better.
    """
    require_comparable(records)
    value = stats.named(value or stats.main_value(records))
    higher = METRICS.get(value.split(" ")[-1])
    require(higher is not None, "value", value, f"must be a split and one of {', '.join(METRICS)}")
    groups = stats.by_row(records)
    found = {row: [*told.values()] for row, group in groups.items() if (told := stats.finished(group, value))}
    require(bool(found), "value", value, "is in no finished run")
    most = max(map(len, found.values()))
    leaders = [row for row, values in found.items() if len(values) == most]
    best = (max if higher else min)(leaders, key=lambda row: np.mean(found[row]))
    scale = f"{value.split(' ')[0]} loss" if value.endswith("perplexity") else value  # its logarithm, in every record
    gaps = {row: stats.paired_differences(groups[row], groups[best], scale) for row in found}
    others = {row: gap for row, gap in gaps.items() if row != best and len(gap.seeds) >= stats.MINIMUM_SEEDS}
    tested = {row: 2 * min(stats.below(gap.differences, 0)) for row, gap in others.items()}
    adjusted = dict(zip(tested, stats.holm([*tested.values()], len(found) - 1), strict=True))
    lines = {}
    for row, values in found.items():
        mean, gap = stats.estimate(values), gaps[row]
        told = "best" if row == best else "too few seeds" if row not in tested else "within noise"
        if adjusted.get(row, 1) < stats.ALPHA:
            told = "better" if (gap.estimate.mean > 0) == higher else "worse"
        lines[row] = {"label": names.label(row, groups[row]), "seeds": mean.count, "common": len(gap.seeds),
                      "mean": mean.mean, "low": mean.low, "high": mean.high, "standing": told}  # fmt: skip
    runs = frame(records).runs
    means = runs[runs["status"] == "done"].groupby("row").mean(numeric_only=True)
    table = pd.DataFrame(lines).T.infer_objects().astype({"low": float, "high": float})
    return table.join(means[[*(name for name, *_ in COSTS.values()), "seconds"]])


def standings_table(records: Sequence[Record], value: str = "") -> pd.DataFrame:
    """`standings` in words, the best first: mean with its 95 % interval, how it stands to the best, costs, fronts."""
    table, value = standings(records, value), stats.named(value or stats.main_value(records))
    higher = METRICS[value.split(" ")[-1]]
    told = pd.DataFrame({"method": table["label"], "seeds": table["seeds"].map("{:g}".format)})
    told[value.replace("_", " ")] = [_interval(*row) for row in table[["mean", "low", "high"]].itertuples(index=False)]
    told["beside the best"] = table["standing"]
    for heading, (name, form, size) in COSTS.items():
        cells = [NONE if np.isnan(cost) else form.format(cost / size) for cost in table[name]]
        ahead = front(table[name], table["mean"], higher)
        told[heading] = [cell + " *" * bool(on) for cell, on in zip(cells, ahead, strict=True)]
    return told.loc[table["mean"].sort_values(ascending=not higher, kind="stable").index]


def _interval(mean: float, low: float, high: float) -> str:
    return score(mean) + ("" if np.isnan(low) else f" [{score(low)}, {score(high)}]")


def verdict(records: Sequence[Record], reference: str = "lora") -> str:
    """In a few sentences: which rows are told from the best and which are not, and what needs no seeds, the costs."""
    table, value = standings(records), stats.main_value(records).replace("_", " ")
    best = table[table["standing"] == "best"].iloc[0]
    said = [f"{best['label']} has the best {value}, {score(best['mean'])}."]
    words = {"worse": "Worse beyond noise", "better": "Better on common seeds", "within noise": "Within its noise"}
    for told, text in words.items():
        rows = table[table["standing"] == told]
        said += [f"{text}: {'; '.join(rows['label'])}."] if len(rows) else []
    if len(few := table[table["standing"] == "too few seeds"]):
        count = f"{few['common'].max():g} common seed{'s' * int(few['common'].max() != 1)}"
        told = f"cannot say whether they are worse ({stats.MINIMUM_SEEDS} give an interval)"
        said.append(f"{'; '.join(few['label'])}: {count} {told}.")
    if reference in table.index:
        one = table.loc[reference]
        for name, what in {"flops": "compute", "predicted_peak": "predicted peak memory"}.items():
            shares = (table[name] / one[name]).drop(reference).dropna().sort_values()
            costs = "; ".join(f"{table.loc[row, 'label']} {share:.2f}" for row, share in shares.items())
            said += [f"Times {one['label']}'s {what}, which seeds hardly change: {costs}."] if costs else []
    return "\n".join(said)


@style.captioned
def tradeoff(records: Sequence[Record], costs: Sequence[str] = ("flops", "predicted_peak"), value: str = "") -> Figure:
    """What was reached against what it cost: a row's mean with its interval; the grey step is the Pareto front."""
    value = stats.named(value or stats.main_value(records))
    higher, table = METRICS[value.split(" ")[-1]], standings(records, value)
    units = {name: (heading, size) for heading, (name, _, size) in COSTS.items()}
    require({*costs} <= {*units} and len(costs) > 0, "costs", [*costs], f"must be among {', '.join(units)}")
    looks, groups = style.looks(table.index), stats.by_row(records)
    with style.panel(3.1, len(costs), sharey=True, squeeze=False) as axes:
        for ax, cost in zip(axes[0], costs, strict=True):
            heading, size = units[cost]
            places = table[cost] / size
            for row, look in looks.items():
                if np.isfinite(places[row]):
                    draw_mean(ax, [*stats.finished(groups[row], value).values()], places[row], 0, look, upright=True)
            ahead = table[front(places, table["mean"], higher)].assign(place=places).sort_values("place")
            ax.step(ahead["place"], ahead["mean"], where="post", color="0.55", lw=1, zorder=0)
            ax.set(xlabel=f"{heading}, mean over seeds", ylabel=value.replace("_", " "))
        title(axes[0, 0], records)
        handles, labels = mean_key(style.Look("0.3", "o"))
        key = [mean_key(look)[0][0] for look in looks.values()]
        return style.legend(axes[0, 0], key=(key + handles, [*table["label"], *labels]))


def which(records: Sequence[Record], mib: float = np.inf, hours: float = np.inf, value: str = "") -> Table:
    """Which row for a case: of those that fit, the ones that are not told from the best of them.

    Args:
        mib: predicted peak that must suffice, MiB, of the recorded model; hours: of training, on the recorded machine.

    Raises:
        ParameterError: a limit is not positive; see `standings`.
    """
    for name, limit in {"mib": mib, "hours": hours}.items():
        require(limit > 0, name, limit, "must be positive")
    value = stats.named(value or stats.main_value(records))
    table = standings(records, value)
    fits = (table["predicted_peak"].fillna(np.inf) <= mib * 2**20) & (table["seconds"].fillna(np.inf) <= hours * 3600)
    case = " and ".join([f"{mib:g} MiB"] * math.isfinite(mib) + [f"{hours:g} h"] * math.isfinite(hours)) or "no limit"
    if not fits.any():
        peak, time = table["predicted_peak"].min() / 2**20, table["seconds"].min() / 3600
        least = "no peak is recorded" if np.isnan(peak) else f"the smallest peak is {peak:,.0f} MiB"
        return Table(f"{case}: no row fits; {least}, the shortest run {time:.2g} h.")
    kept = standings_table([record for record in records if record.row in table.index[fits]], value)
    told = kept[kept["beside the best"] != "worse"]
    unsure = (told["beside the best"] == "too few seeds").any()
    count = f"{len(told)} of {len(kept)} rows that fit are not told from the best"
    said = "cannot say which is best: too few seeds" if unsure else count
    return Table(f"{case}: {said}. * marks a row that none beats in that cost and the mean.", told)
