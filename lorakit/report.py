"""`lorakit report RESULTS… --output report.md`: one setting's runs compared at equal cost, in Markdown."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import report_data, report_tables, stats, style
from lorakit.errors import DataError, ParameterError, require
from lorakit.files import write_text
from lorakit.records import Record, read_all
from lorakit.report_data import Groups, label
from lorakit.report_header import header
from lorakit.report_tables import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "accepted_steps": "accepted steps (batches that got a backward pass)",
    "tokens": "tokens seen",
    "flops": "training compute",
    "seconds": "training time (depends on the machine and on what else ran there)",
}
READING = """\
Differences are of validation loss (nats, lower is better), row minus the other, paired by seed, with a 95 % interval of
the mean over the pairs: Student's t below 8 pairs, a bootstrap from 8 on, none below 3. **below** means that the row's
loss is lower, **above** that it is higher, **within noise** that the interval holds 0, **too few seeds** that there is
no interval. No correction is made for the number of comparisons: of twenty without any effect, one is expected outside
the noise."""
EQUAL = """\
Each pair of runs is compared at the largest x that both reach. A run's loss is known only where it was evaluated
({evaluations} times a run); in between it is interpolated on a straight line, which on a falling curve tends to be too
high. **decayed** says whether both runs were there at the end of their own learning-rate schedule, at least {decayed}
of the way, and if not, how far the other one was. A verdict marked {mark} is of a finished run and one whose learning
rate was still high: not a fair comparison, mostly in favour of the finished one. Rows with a gate are also compared
with a random choice at the same rate and, where the baseline is not at its end, with the ungated row that fits best."""
CRITERION = """\
The criterion: final validation loss at most {loss} above that of {reference} (`{row}`), at {steps} fewer
accepted steps or better in every pair. Both are compared at their own end. **passed**: the whole interval is at or
below the limit; **failed**: it is above, or too few steps were saved; **undecided**: the interval holds the limit, or
there are too few seeds for one."""


def report(records: Sequence[Record], baseline: str = "", sources: Sequence[str] = (), pictures: str = "") -> str:
    """The report on the records of one setting, in Markdown.

    Args:
        baseline: the row all others are compared with; empty: see `report_data.rows_of`.
        sources: where the records were read; pictures: Markdown of the figures.

    Raises:
        ParameterError: no records, several settings, two records of a row and seed, or no record of the baseline.
    """
    groups = report_data.rows_of(records, baseline)
    parts = [
        f"# {records[0].setting}: {len(groups)} rows compared",
        header(groups, sources),
        READING,
        "## What each row reached",
        f"Means ± standard deviation over the seeds that finished. The baseline is `{next(iter(groups))}`.",
        report_tables.quality_table(groups),
        "## What it cost",
        report_tables.cost_table(groups),
        *_at_equal_cost(groups),
        *([] if report_data.chooses_tokens(groups) else _criterion(groups)),
        *_warnings(groups),
    ]
    return "\n\n".join([*parts, *([f"## Figures\n\n{pictures}"] if pictures else [])]) + "\n"


# what is compared ------------------------------------------------------------------------------------


def _at_equal_cost(groups: Groups) -> list[str]:
    if len(groups) == 1:
        return ["## At equal cost", "One row: nothing to compare it with."]
    counts = sorted({len(stats.curve(r, "steps")[0]) for group in groups.values() for r in group if r.status == "done"})
    times = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1])))) if counts else "0"
    text = EQUAL.format(evaluations=times, decayed=percent(report_data.DECAYED), mark=report_tables.UNFAIR)
    parts = ["## At equal cost", text]
    for axis in report_data.AXES:
        parts += [f"### At equal {TITLES[axis]}", report_tables.equal_table(report_data.comparisons(groups, axis))]
    lonely = [f"{label(row)} (at {percent(rate)})" for row, rate in report_data.without_random(groups).items()]
    return parts + ([f"No random row at the same rate: {', '.join(lonely)}."] if lonely else [])


def _criterion(groups: Groups) -> list[str]:
    reference = report_data.reference_of(groups)
    found = [report_data.criterion(group, groups[reference]) for row, group in groups.items() if row != reference]
    text = CRITERION.format(
        loss=percent(report_data.LOSS_LIMIT, 1),
        steps=percent(report_data.STEPS_LIMIT),
        reference=label(reference),
        row=reference,
    )
    return ["## The criterion", text, report_tables.criterion_table(found)] if found else []


def _warnings(groups: Groups) -> list[str]:
    """Unfinished runs, what the gates warned of, and what the runs noted."""
    records = [record for group in groups.values() for record in group]
    unfinished = [(r, [_ended(r)]) for r in records if r.status != "done"]
    warned = [(r, r.details.get("gate", {}).get("warnings", [])) for r in records]
    parts = []
    for title, found in (
        ("Runs that did not finish", unfinished),
        ("Warnings of the gates", warned),
        ("Notes of the runs", [(r, r.notes) for r in records]),
    ):
        parts += [f"## {title}", _bullets(found, len(records)) or "None."]
    return parts


def _ended(record: Record) -> str:
    last = f" after step {record.curve[-1].step}" if record.curve else ""
    return record.status.replace("_", " ") + last + (f": {record.message}" if record.message else "")


def _bullets(found: list[tuple[Record, list[str]]], everyone: int) -> str:
    """Each text once, with the runs it is about."""
    runs: dict[str, list[str]] = {}
    for record, texts in found:
        for text in texts:
            runs.setdefault(" ".join(text.split()), []).append(f"`{record.method}` seed {record.seed}")
    return "\n".join(
        f"- {'all runs' if len(names) == everyone > 1 else ', '.join(names)}: {text}" for text, names in runs.items()
    )


# figures and files -----------------------------------------------------------------------------------


def figures_of(records: Sequence[Record]) -> dict[str, tuple[str, Figure]]:
    """File name -> what it shows, and the figure; those about gates only where there are any."""
    from lorakit import figures, gate_figures

    found = {
        f"loss_by_{axis}.png": (f"Validation loss against {style.X_LABELS[axis]}", figures.loss_curve(records, axis))
        for axis in report_data.AXES
    }
    if gate_figures.log_table(records, "gate/acceptance_rate", after_burn_in=True):
        found["acceptance.png"] = ("Acceptance rate against its target", gate_figures.acceptance(records))
    if any(gate_figures.gate(record).get("name") in gate_figures.NOVELTY_GATES for record in records):
        found["novelty.png"] = ("Novelty of the candidate batches", gate_figures.novelty(records))
    if gate_figures.ledger_table(records):
        found["ledger.png"] = ("What the compute was spent on", gate_figures.gate_ledger(records))
    return found


def _save(drawn: dict[str, tuple[str, Figure]], folder: Path, beside: Path) -> str:
    """Write the figures to `folder`; Markdown that shows them in a report that lies `beside`."""
    shown = []
    for name, (text, figure) in drawn.items():
        path = style.save(figure, folder / name)
        shown.append(f"![{text}]({Path(os.path.relpath(path, beside)).as_posix()})\n\n{text}.")
    return "\n\n".join(shown)


def _require_folder(name: str, given: str, folder: Path) -> None:
    """`folder` can be written to, or made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(there.is_dir() and os.access(there, os.W_OK), name, given, f"{there} cannot be written to")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report on the records under RESULTS; nothing is written where they cannot be compared.

    Raises:
        LorakitError: no records, several settings, no record of the baseline, or a place that cannot be written to.
    """
    args = _parser().parse_args(argv)
    records = read_all(args.results)
    if not records:
        raise DataError(f"{', '.join(args.results)}: no records there")
    output = Path(args.output)
    _require_folder("--output", args.output, output.parent)
    require(not output.is_dir(), "--output", args.output, "is a folder, must be a file")
    report(records, args.baseline)  # what cannot be compared is found out before anything is written
    pictures = ""
    if args.figures:
        _require_folder("--figures", args.figures, Path(args.figures))
    try:
        if args.figures:
            pictures = _save(figures_of(records), Path(args.figures), output.parent)
        write_text(report(records, args.baseline, args.results, pictures), output)
    except OSError as error:
        raise ParameterError("--output", args.output, f"cannot be written: {error}") from None
    print(f"{args.output}: {len(records)} runs of {len(stats.by_method(records))} rows")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorakit report", description="Compare one setting's rows at equal cost.")
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="record files, or folders of them")
    parser.add_argument("--output", required=True, metavar="FILE", help="the report, in Markdown")
    parser.add_argument("--baseline", default="", metavar="ROW", help="compare with it (default: baseline, else lora)")
    parser.add_argument("--figures", metavar="DIR", help="draw figures there and show them in the report")
    return parser
