"""`lorakit table RESULTS…`: what each row bought and what it cost, as tables, and which gaps are noise."""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd

from lorakit.analysis import names, stats
from lorakit.analysis.frame import frame, require_comparable
from lorakit.errors import DataError, require
from lorakit.files import write_text
from lorakit.records import AXES, Record, read_all

NONE = "-"
SCORE = ""  # form of a column that shows the standard deviation over seeds as well
Column = tuple[str, str, float]  # of `frame(records).runs`: its name, how a number is written, what it is divided by
PEAK: dict[str, Column] = {"predicted peak MiB": ("predicted_peak", "{:,.1f}", 2**20)}
TRAINABLE: dict[str, Column] = {"trainable": ("trainable", "{:,.0f}", 1)}


class Table:
    """Tables of words, and sentences between them (empty ones are left out), one after the other.

    Jupyter shows HTML, a terminal aligned text, `markdown()` is for files. The same words give the same output, byte
    by byte, so that a notebook's can be compared.
    """

    def __init__(self, *parts: pd.DataFrame | str):
        self.parts = tuple(part for part in parts if isinstance(part, pd.DataFrame) or part)

    def markdown(self) -> str:
        return self.text("pipe")

    def text(self, layout: str = "simple") -> str:
        """The parts, empty lines between; `layout` is tabulate's."""
        words = {"tablefmt": layout, "index": False, "disable_numparse": True}
        bar = "\\|" if layout == "pipe" else "|"
        written = []
        for part in self.parts:
            if not isinstance(part, str):
                told = part.map(lambda cell: " ".join(cell.split()).replace("|", bar))
                part = told.to_markdown(colalign=["left", *["right"] * (len(part.columns) - 1)], **words)
            written.append(part)
        return "\n\n".join(written)

    __str__ = __repr__ = text

    def tell(self, markdown: bool, output: str | None) -> None:
        """Print it, as aligned text or Markdown, and write it to the file `output` as well, where one is named."""
        text = (self.markdown() if markdown else str(self)) + "\n"
        print(text, end="")
        if output:
            write_text(text, output)

    def _repr_html_(self) -> str:
        shown = []
        for place, part in enumerate(self.parts):
            if isinstance(part, str):
                shown.append(f"<p>{escape(part)}</p>".replace("\n", "<br>"))
                continue
            styler = part.style.format(escape="html").hide(axis="index").set_uuid(f"lorakit{place}")
            left = [{"selector": ".col0", "props": "text-align: left"}]
            shown.append(styler.format_index(escape="html", axis=1).set_table_styles(left).to_html())
        return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", "\n".join(shown))  # as Markdown has it


def results_table(records: Sequence[Record], *, mixed: bool = False) -> Table:
    """Two tables over one setting's records, a line per row: what it bought, and what it cost.

    Numbers are means over the runs that finished, scores with the standard deviation over seeds. None of them moves
    with the clock: seconds of runs at other hours compare poorly, see `lorakit time`.

    Args:
        mixed: also of runs on different models or data; a sentence above says so.

    Raises:
        ParameterError: the records cannot stand in one table.
    """
    groups = stats.by_row(records)
    warning = require_comparable(records, mixed)
    runs = frame([record for group in groups.values() for record in group]).runs
    scores = {name.replace("_", " "): (name, SCORE, 1) for name in (stats.main_value(records), stats.LOSS)}
    size = {"total/trainable": ("reduction_factor", "{:,.1f}", 1), "adapter MiB": ("adapter_bytes", "{:,.2f}", 2**20)}
    quality = summary(runs, scores | TRAINABLE | size)
    quality.insert(1, "seeds", [str(len(group)) for group in groups.values()])
    quality.insert(2, "status", [statuses(group) for group in groups.values()])
    cost = axis_columns("accepted_steps", "tokens", "flops") | PEAK
    return Table(warning, quality, summary(runs, cost), "\n".join(remarks(groups)))


def axis_columns(*axes: str) -> dict[str, Column]:
    """What a run spent in all, as columns of `summary`."""
    return {AXES[name].unit: (name, AXES[name].form, AXES[name].size) for name in axes}


def summary(runs: pd.DataFrame, columns: Mapping[str, Column]) -> pd.DataFrame:
    """Words: a line per row of `frame(records).runs`, in its order, with the mean of each column over finished runs.

    A caller may add columns to `runs` before; "-" is where no finished run has a number. A score that some of the
    finished runs lack says of how many it is.
    """
    labels = runs.drop_duplicates("row").set_index("row")["label"]
    done = runs[runs["status"] == "done"].set_index("row")
    table = {"method": labels.to_list()}
    for heading, (name, form, size) in columns.items():
        values = done.reindex(columns=[name])[name] / size  # a metric may be in no run
        table[heading] = [_in_words(values[values.index == row], form) for row in labels.index]
    return pd.DataFrame(table)


def _in_words(values: pd.Series, form: str) -> str:
    known = values[np.isfinite(values)]
    if known.empty:
        return NONE
    some = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return form.format(known.mean()) if form else score(known.mean(), known.std()) + some


def percent(share: float) -> str:
    """Three digits, so that 22.5 % is not 22 %."""
    return f"{100 * share:.3g} %"


def score(mean: float, spread: float = math.nan) -> str:
    """Mean ± spread, the spread where there is one. Three decimals; from 100 on one, from a million on an exponent."""
    numbers = [number for number in (mean, spread) if not math.isnan(number)]
    forms = ["{:.3f}" if abs(number) < 100 else "{:,.1f}" if abs(number) < 1e6 else "{:.2e}" for number in numbers]
    return " ± ".join(form.format(number) for form, number in zip(forms, numbers, strict=True))


def statuses(group: Sequence[Record]) -> str:
    """How many of the runs ended how, `done` first: "3 done, 1 diverged"."""
    counts = Counter(record.status for record in group)
    ended = sorted(counts, key=lambda status: (status != "done", status))
    return ", ".join(f"{counts[status]} {status.replace('_', ' ')}" for status in ended)


def remarks(groups: Mapping[str, Sequence[Record]]) -> list[str]:
    """What a reader must know of rows that are more than one change away from the reference, as far as records say.

    A row's `differs` with its reasons; and that nobody searched its learning rate.
    """
    found: dict[str, None] = {}
    for row, group in groups.items():
        for record in group:
            name, asked = names.label(row, group), record.resolved
            for key, reason in (asked.get("differs") or {}).items():
                found[f"{name}: {key} differs: {reason}"] = None
            unsaid = "learning_rate_from" in asked and not asked["learning_rate_from"]
            if unsaid or any("rate not searched" in note for note in record.notes):
                found[f"{name}: rate not searched"] = None
    return [*found]


def timing_table(records: Sequence[Record]) -> pd.DataFrame:
    """Records of kind "timing" in words, a line per row: medians, and ratios to the reference with their quartiles."""
    lines, labels = [], names.labels(records)
    for row in labels:
        timing = next(record.details["timing"] for record in records if record.row == row)
        line = {"method": labels[row]}
        for name, what in (("step", "step"), ("answer", "answer"), ("merged", "answer, merged")):
            low, middle, high = timing.get(name, {}).get("ratio", [math.nan] * 3)
            line[f"{what} ms"] = f"{timing[name]['ms'][1]:,.1f}" if name in timing else NONE
            line[f"{what} ×"] = NONE if math.isnan(middle) else f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            if name == "step":
                line["accepted step ×"] = f"{timing['accepted'] or math.nan:.2f}".replace("nan", NONE)
        lines.append(line | {"padding": percent(timing["padding"])})
    return pd.DataFrame(lines)


# differences -----------------------------------------------------------------------------------------


def gaps(records: Sequence[Record], baseline: str = "", *, mixed: bool = False) -> Table:
    """A line per row: its gap to the baseline over common seeds, the 95 % interval, and whether it is noise.

    Args:
        baseline: a row; empty: full fine-tuning where there is one, else the first row.
    """
    groups = stats.by_row(records)
    warning = require_comparable(records, mixed)
    if not (found := stats.compare(records, baseline or next(iter(groups)))):
        return Table("One row: nothing to compare it with.")
    lines = [told(gap, records) | {"value": gap.value.replace("_", " ")} for gap in found]
    columns = ["row", "against", "value", "difference", "95 % interval", "pairs", "verdict"]
    return Table(warning, pd.DataFrame(lines)[columns])


def told(gap: stats.Difference, records: Iterable[Record] = (), form: str = "{:+.3f}") -> dict[str, str]:
    """A difference in words, as cells of a table; `records` know labels of their own."""
    records, mean = [*records], gap.estimate
    return {
        "row": names.label(gap.method, records),
        "against": names.label(gap.baseline, records),
        "difference": form.format(mean.mean) if mean else NONE,
        "95 % interval": mean.interval(form) or NONE if mean else NONE,
        "pairs": f"{len(gap.seeds)}" + (f" (without seed {', '.join(map(str, gap.left_out))})" if gap.left_out else ""),
        "verdict": gap.verdict,
    }


def sentence(records: Sequence[Record], row: str, baseline: str) -> str:
    """What `row` reached and cost beside `baseline`, means over the seeds that finished in both, as one sentence.

    For the last line of a notebook, which must be about the runs it shows, whatever they are.
    """
    groups, labels = stats.by_row(records), names.labels(records)
    if missing := [name for name in (row, baseline) if name not in groups]:
        return f"{records[0].setting}: no run of {' and '.join(map(names.label, missing))} here to compare."
    values = dict.fromkeys([stats.main_value(records), stats.LOSS])
    gaps = [stats.paired_differences(groups[row], groups[baseline], value) for value in values]
    gaps = [gap for gap in gaps if gap.seeds]
    if not gaps:
        return f"{records[0].setting}: {labels[row]} and {labels[baseline]} have no seed that finished in both."
    require_comparable([*groups[row], *groups[baseline]])
    runs = frame([*groups[row], *groups[baseline]]).runs
    means = [runs[runs["seed"].isin(gap.seeds)].groupby("row").mean(numeric_only=True).T for gap in gaps]
    ours, theirs = means[0][row], means[0][baseline]
    pairs = [(gap, *mean.loc[gap.value, [row, baseline]]) for gap, mean in zip(gaps, means, strict=True)]
    reached = [f"{gap.value.replace('_', ' ')} {a:.3f} against {b:.3f} ({gap.verdict})" for gap, a, b in pairs]
    spent = {"trainable": "trained parameters", "flops": "FLOPs", "predicted_peak": "predicted peak memory"}
    shares = {word: ours[name] / theirs[name] for name, word in spent.items()}
    costs = [f"{word} × {share:.3g}" for word, share in shares.items() if math.isfinite(share)]
    seeds = f"{len(gaps[0].seeds)} seed{'s' * (len(gaps[0].seeds) > 1)}"
    said = f"{labels[row]} against {labels[baseline]} on {records[0].setting}, {seeds}"
    return f"{said}: {', '.join(reached)}; {', '.join(costs)}."


# the command -----------------------------------------------------------------------------------------


def asked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Record]]:
    """The options of a command about records, and the records it is given.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="record files, or folders of them")
    parser.add_argument("--mixed", action="store_true", help="also runs on different models or data, side by side")
    args = parser.parse_args(argv)
    if not (records := read_all(args.results)):
        raise DataError(f"{', '.join(args.results)}: no records there")
    return args, records


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and the gaps of the records under RESULTS, one part per setting.

    Raises:
        LorakitError: no record, an unreadable one, records that cannot be compared, an unknown baseline, or a figure
            that cannot be drawn.
    """
    parser = argparse.ArgumentParser(prog="lorakit table", description="Tabulate records; say which gaps are noise.")
    parser.add_argument("--baseline", default="", metavar="ROW", help="compare with it (default: full)")
    parser.add_argument("--figure", metavar="FILE", help="draw loss and memory (png, pdf, svg)")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--output", metavar="FILE", help="write the text there as well")
    args, found = asked(parser, argv)
    settings = sorted({record.setting for record in found})
    require(not args.figure or len(settings) == 1, "--figure", settings, "draws the records of one setting")

    parts: list[pd.DataFrame | str] = []
    for name in settings:
        records = [record for record in found if record.setting == name]
        parts += [f"## {name}" if args.markdown else name, *results_table(records, mixed=args.mixed).parts]
        parts += gaps(records, args.baseline, mixed=args.mixed).parts
    if args.figure:
        from lorakit.analysis import figures, style

        style.save(figures.overview(found, mixed=args.mixed), args.figure)
    Table(*parts).tell(args.markdown, args.output)
    return 0
