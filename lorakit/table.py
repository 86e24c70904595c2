"""`lorakit table RESULTS…`: what each method bought and what it cost, as text, and which gaps are noise."""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lorakit import stats, style
from lorakit.errors import DataError, require
from lorakit.files import write_text
from lorakit.records import Record, read_all

Cell = Callable[[list[Record]], str]
NONE = "-"


def results_table(records: Sequence[Record], *, markdown: bool = False, timing: bool = True) -> str:
    """Two tables over one setting's records, a row per method: what it bought, and what it cost.

    Numbers are means over the runs that finished, scores with the standard deviation over seeds.

    Args:
        markdown: as Markdown, else as aligned text.
        timing: with latency and seconds; a notebook cell whose output is compared leaves them out.
    """
    groups = stats.by_method(records)
    columns = [_quality(stats.main_value(records)), _cost() | (_timing() if timing else {})]
    return "\n\n".join(layout(cells(groups, part), markdown) for part in columns)


def _quality(value: str) -> dict[str, Cell]:
    scores = {name.replace("_", " "): score_cell(name) for name in (value, "validation loss")}
    return (
        {"seeds": lambda group: str(len(group)), "status": statuses}
        | scores
        | {
            "trainable": mean_cell(lambda r: r.parameters and r.parameters.trainable, "{:,.0f}"),
            "total/trainable": mean_cell(lambda r: r.parameters and r.parameters.reduction_factor, "{:,.1f}"),
            "adapter MiB": mean_cell(lambda r: _mebibytes(r.adapter_bytes), "{:,.2f}"),
        }
    )


def _cost() -> dict[str, Cell]:
    return {
        "accepted steps": mean_cell(lambda r: r.costs.accepted_steps, "{:,.0f}"),
        "tokens": mean_cell(lambda r: r.costs.tokens, "{:,.0f}"),
        "TFLOPs": mean_cell(lambda r: r.costs.flops / 1e12, "{:.3g}"),
        "predicted peak MiB": mean_cell(lambda r: _mebibytes((r.costs.predicted_memory or {}).get("peak")), "{:,.1f}"),
    }


def _timing() -> dict[str, Cell]:
    return {
        "latency ms": mean_cell(lambda r: r.latency and r.latency.unmerged_ms, "{:,.2f}"),
        "merged latency ms": mean_cell(lambda r: r.latency and r.latency.merged_ms, "{:,.2f}"),
        "seconds": mean_cell(lambda r: r.costs.seconds, "{:,.1f}"),
    }


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def statuses(group: list[Record]) -> str:
    """How many of the runs ended how: "3 done, 1 diverged"."""
    return ", ".join(f"{number} {status.replace('_', ' ')}" for status, number in _ended(group).items())


def _ended(group: list[Record]) -> dict[str, int]:
    """Statuses and how many runs have them, `done` first."""
    counts = Counter(record.status for record in group)
    return {status: counts[status] for status in sorted(counts, key=lambda status: (status != "done", status))}


def score_cell(value: str) -> Cell:
    """Mean ± standard deviation over the seeds of a final metric."""

    def cell(group: list[Record]) -> str:
        numbers = [*stats.finished(group, value).values()]
        if not numbers:
            return NONE
        spread = f" ± {_digits(statistics.stdev(numbers))}" if len(numbers) > 1 else ""
        return _digits(statistics.mean(numbers)) + spread

    return cell


def _digits(number: float) -> str:
    """Three decimals; from 100 on one, from a million on an exponent."""
    size = abs(number)
    return f"{number:.3f}" if size < 100 else f"{number:,.1f}" if size < 1e6 else f"{number:.2e}"


def mean_cell(read: Callable[[Record], float | None], form: str) -> Cell:
    """Mean over the runs that finished of what `read` finds, written as `form` says."""

    def cell(group: list[Record]) -> str:
        numbers = [number for record in group if record.status == "done" and (number := read(record)) is not None]
        return form.format(statistics.fmean(numbers)) if numbers else NONE

    return cell


def cells(groups: dict[str, list[Record]], columns: dict[str, Cell]) -> list[list[str]]:
    """A head and one line of words per row."""
    looks = style.looks(groups)
    rows = [[looks[name].label, *(cell(group) for cell in columns.values())] for name, group in groups.items()]
    return [["method", *columns], *rows]


def layout(rows: list[list[str]], markdown: bool) -> str:
    """Lines of equal width: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def gaps(records: Sequence[Record], baseline: str = "") -> str:
    """A line per method: its gap to the baseline over common seeds, the 95 % interval, and whether it is noise.

    Args:
        baseline: a method; empty: full fine-tuning where there is one, else the first method.
    """
    groups = stats.by_method(records)
    differences = stats.compare(records, baseline or next(iter(groups)))
    return "\n".join(map(_sentence, differences)) or "One method: nothing to compare it with."


def _sentence(gap: stats.Difference) -> str:
    looks = style.looks([gap.method, gap.baseline])
    text = f"{gap.value.replace('_', ' ')}: {looks[gap.method].label} - {looks[gap.baseline].label}"
    if gap.estimate is None:
        return f"{text}: no seed finished in both"
    pairs = f"{gap.estimate.count} common seed{'s' * (gap.estimate.count != 1)}"
    text += f" = {gap.estimate.mean:+.3f}"
    if gap.estimate.low is not None and gap.estimate.high is not None:
        text += f" [{gap.estimate.low:+.3f}, {gap.estimate.high:+.3f}]"
        pairs += f", 95 % {gap.estimate.how} interval"
    left_out = f"; left out: seed {', '.join(map(str, gap.left_out))}" if gap.left_out else ""
    return f"{text} ({pairs}{left_out}): {gap.verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and the gaps of the records under RESULTS, one part per setting.

    Raises:
        LorakitError: no record, an unreadable one, an unknown baseline, or a figure that cannot be drawn.
    """
    args = _parser().parse_args(argv)
    settings = _by_setting(args.results)
    require(not args.figure or len(settings) == 1, "--figure", sorted(settings), "draws the records of one setting")
    text = "\n\n".join(_part(name, records, args) for name, records in settings.items()) + "\n"
    print(text, end="")
    if args.figure:
        from lorakit import figures

        style.save(figures.overview(next(iter(settings.values()))), args.figure)
    if args.output:
        write_text(text, Path(args.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorakit table", description="Tabulate records; say which gaps are noise.")
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="record files, or folders of them")
    parser.add_argument("--baseline", default="", metavar="METHOD", help="compare with it (default: full)")
    parser.add_argument("--figure", metavar="FILE", help="draw loss and memory (png, pdf, svg)")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--output", metavar="FILE", help="write the text there as well")
    return parser


def _by_setting(paths: list[str]) -> dict[str, list[Record]]:
    settings: dict[str, list[Record]] = {}
    for record in read_all(paths):
        settings.setdefault(record.setting, []).append(record)
    if not settings:
        raise DataError(f"{', '.join(paths)}: no records there")
    return dict(sorted(settings.items()))


def _part(setting: str, records: list[Record], args: argparse.Namespace) -> str:
    heading = f"## {setting}" if args.markdown else setting
    lines = gaps(records, args.baseline)
    if args.markdown:  # a list, or its lines would run together
        lines = "\n".join(f"- {line}" for line in lines.split("\n"))
    return "\n\n".join((heading, results_table(records, markdown=args.markdown), lines))
