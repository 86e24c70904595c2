"""`lorakit report RESULTS… --output report.md`: one setting's runs compared at equal cost, in Markdown."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template

from lorakit.analysis import equal_cost, names, stats, tables
from lorakit.analysis.equal_cost import Groups
from lorakit.analysis.frame import frame, gate_of, require_comparable
from lorakit.analysis.tables import NONE, SCORE, Table, axis_columns, summary
from lorakit.errors import ParameterError, retold
from lorakit.files import CONFIGS, require_place, write_text
from lorakit.records import AXES, Record

UNFAIR, REFERENCE = "†", "full_length"  # the row of the criterion
TEXT = (CONFIGS / "report.md.jinja").read_text(encoding="utf-8")


def report(records: Sequence[Record], baseline: str = "", sources: Sequence[str] = (), mixed: bool = False) -> str:
    """The report on the records of one setting, in Markdown.

    Args:
        baseline: the row all others are compared with; empty: see `equal_cost.rows_of`.
        sources: where the records were read.
        mixed: also of runs on different models or data; the title says so.

    Raises:
        ParameterError: no records, several settings, two records of a row and seed, records that cannot be compared, or
            no record of the baseline.
    """
    groups = equal_cost.rows_of(records, baseline)
    warning = require_comparable(records, mixed)
    counts = {len(stats.curve(r, "steps")[0]) for r in records if r.status == "done"} or {0}
    return Template(TEXT, trim_blocks=True, keep_trailing_newline=True).render(
        setting=records[0].setting, groups=groups, warning=warning, header=header(groups, sources),
        quality=quality_table(groups), remarks=tables.remarks(groups), cost=cost_table(groups),
        evaluations=" to ".join(map(str, sorted({min(counts), max(counts)}))), unfair=UNFAIR,
        decayed=f"{100 * stats.DECAYED:.0f} %", equal=equal_tables(groups),
        lonely=[f"{names.label(row, group)} (at {tables.percent(rate)})" for row, group in groups.items()
                if equal_cost.random_for(groups, row) is None and (rate := gate_of(group)[1]) is not None],
        criterion=criterion_table(groups), loss=f"{100 * equal_cost.LOSS_LIMIT:.1f} %",
        steps=f"{100 * equal_cost.STEPS_LIMIT:.0f} %", told=told(groups), label=names.label(REFERENCE, records),
        markdown=lambda table: Table(table).markdown(),
        examples=any(gate_of(group)[0].endswith(" example") for group in groups.values()),
    )  # fmt: skip


def header(groups: Groups, sources: Sequence[str]) -> dict[str, str]:
    """What the report is about, as far as the records say: what all rows share, and where they differ."""

    def budget(record: Record) -> str | None:
        asked = {"budget_unit": ""} | record.resolved
        return "{budget:,g} {budget_unit}".format(**asked).replace("_", " ") if "budget" in asked else None

    records = [*chain(*groups.values())]
    read = f" under {', '.join(f'`{name}`' for name in sources)}" if sources else ""
    tasks = each(r.resolved.get("task") for r in records)
    files = each(_known(*file) for r in records for file in r.fingerprints.get("data", {}).items())
    machines = each(", ".join(r.environment[n] for n in ("cpu", "device") if r.environment.get(n)) for r in records)
    codes = each((r.fingerprints.get("code") or "")[:12] for r in records)
    versions = each(f"{n} {v}" for r in records for n, v in r.environment.get("versions", {}).items() if v)
    return {
        "Setting": f"`{records[0].setting}`", "Read": f"{len(records)} records{read}",
        "Model": ", ".join(each(_known(r.resolved.get("model"), r.fingerprints.get("model")) for r in records)),
        "Data": ": ".join(", ".join(found) for found in (tasks, files) if found), "Seeds": _by_row(groups,
        lambda r: r.seed), "Learning rate": _by_row(groups, lambda r: r.resolved.get("learning_rate")),
        "Schedule": _by_row(groups, lambda r: r.resolved.get("schedule")), "Budget": _by_row(groups, budget),
        "Versions": ", ".join(versions),
        "Machine": "; ".join(machines) + " (seconds are not comparable)" * (len(machines) > 1),
        "Code": ", ".join(codes) + " (fingerprints differ)" * (len(codes) > 1),
    }  # fmt: skip


def each(found: Iterable[Any]) -> list[str]:
    """What is said at all, each once."""
    return [*dict.fromkeys(str(value) for value in found if value not in (None, ""))]


def _by_row(groups: Groups, value: Callable[[Record], Any]) -> str:
    """What all rows share, else each row's own."""
    texts = {row: ", ".join(each(map(value, group))) or "not recorded" for row, group in groups.items()}
    common = max(texts.values(), key=[*texts.values()].count)
    others = [f"`{row}` {text}" for row, text in texts.items() if text != common]
    return f"{common}; but {'; '.join(others)}" if others else common.replace("not recorded", "")


def _known(name: str | None, digest: str | None) -> str:
    return f"{name or ''} ({digest[:12]})".strip() if digest else name or ""


# tables ----------------------------------------------------------------------------------------------


def quality_table(groups: Groups) -> pd.DataFrame:
    """Runs, learning rate, final validation loss and metric of each row, with the standard deviation over seeds."""
    records = [*chain(*groups.values())]
    runs, metric = frame(records).runs, stats.main_value(records).partition(" ")[2]
    scores = dict.fromkeys([stats.LOSS, *(name for name in (f"validation {metric}", f"test {metric}") if name in runs)])
    table = summary(runs, {name.replace("_", " "): (name, SCORE, 1) for name in scores})
    rates = [each(r.resolved.get("learning_rate") for r in group) for group in groups.values()]
    table.insert(1, "row", [f"`{row}`" for row in groups])
    table.insert(2, "seeds", [", ".join(str(record.seed) for record in group) for group in groups.values()])
    table.insert(3, "runs", [tables.statuses(group) for group in groups.values()])
    table.insert(4, "learning rate", [", ".join(f"{float(rate):.3g}" for rate in found) or NONE for found in rates])
    return table


def cost_table(groups: Groups) -> pd.DataFrame:
    """What each row cost and accepted, means over the runs that finished."""
    runs = frame([*chain(*groups.values())]).runs
    runs = runs.assign(accepted=100 * runs["accepted_steps"] / runs["steps"])
    columns = axis_columns("accepted_steps", "steps", "tokens", "flops", "seconds")
    columns |= {"accepted": ("accepted", "{:.3g} %", 1), "after burn-in": ("acceptance_rate", "{:.1f} %", 0.01)}
    rates = [gate_of(group)[1] for group in groups.values()]
    return summary(runs, columns).assign(target=[NONE if rate is None else tables.percent(rate) for rate in rates])


def equal_table(found: Sequence[stats.Comparison], records: Sequence[Record] = ()) -> pd.DataFrame:
    """Differences in validation loss at an equal amount of one axis, a line per pair of rows."""
    axis, lines = AXES[found[0].axis], []
    for one in found:
        line = tables.told(one.gap, records, form="{:+.4f}")
        ends = sorted(one.places.values())
        late = [f"{names.label(r, records)} at {int(100 * x)} %" for r, x in one.shares.items() if x < stats.DECAYED]
        fair = f"no: {', '.join(late)}" if late else "yes"
        reached = dict.fromkeys(axis.form.format(x / axis.size) for x in ends[:: max(1, len(ends) - 1)])
        line[f"at {axis.unit}"] = " to ".join(reached) or NONE
        line["decayed"] = NONE if not ends else "constant rate" if one.constant else fair
        line["verdict"] += f" {UNFAIR}" if ends and not one.fair else ""
        lines.append(line)
    columns = ["row", "against", f"at {axis.unit}", "difference", "95 % interval", "pairs", "decayed", "verdict"]
    return pd.DataFrame(lines)[columns]


def equal_tables(groups: Groups) -> dict[str, pd.DataFrame]:
    """Title of an axis -> `equal_table`; of one row there is nothing to compare."""
    axes, records = equal_cost.AXES if len(groups) > 1 else (), [*chain(*groups.values())]
    return {AXES[x].title or AXES[x].label: equal_table(equal_cost.comparisons(groups, x), records) for x in axes}


def criterion_table(groups: Groups) -> pd.DataFrame | None:
    """Each row held against the one of full length: relative loss with its interval, steps saved, verdict.

    None where the rows choose tokens or examples, and none of them batches; or where there is no such row.
    """
    gates = {gate_of(group)[0] for group in groups.values()} - {"none"}
    if gates and all(" " in name for name in gates) or REFERENCE not in groups or len(groups) == 1:
        return None
    lines, records = [], [*chain(*groups.values())]
    for row in [row for row in groups if row != REFERENCE]:
        one = equal_cost.criterion(groups[row], groups[REFERENCE])
        line = tables.told(one.gap, records, form="{:+.2%}")
        line["fewer accepted steps"] = NONE if one.saved is None else f"{100 * one.saved:.1f} %"
        line["verdict"] = f"**{one.verdict}**" + (f" ({one.reason})" if one.reason else "")
        lines.append(line)
    table = pd.DataFrame(lines).rename(columns={"difference": (relative := "validation loss, relative")})
    return table[["row", relative, "95 % interval", "pairs", "fewer accepted steps", "verdict"]]


def told(groups: Groups) -> dict[str, dict[str, str]]:
    """Unfinished runs, what the gates warned of, and what the runs noted: each text once -> the runs it is about."""
    records, found = [*chain(*groups.values())], {}
    sections: dict[str, Callable[[Record], list[str]]] = {
        "Runs that did not finish": lambda r: [] if r.status == "done" else [_end(r)],
        "Warnings of the gates": lambda r: r.details.get("gate", {}).get("warnings", []),
        "Notes of the runs": lambda r: r.notes,
    }
    for title, texts in sections.items():
        runs: dict[str, list[str]] = {}
        for record in records:
            for text in texts(record):
                runs.setdefault(" ".join(text.split()), []).append(f"`{record.row}` seed {record.seed}")
        found[title] = {text: "all runs" if len(about) == len(records) > 1 else ", ".join(about)
                        for text, about in runs.items()}  # fmt: skip
    return found


def _end(record: Record) -> str:
    last = f" after step {record.curve[-1].step}" if record.curve else ""
    return record.status.replace("_", " ") + last + (f": {record.message}" if record.message else "")


# figures and files -----------------------------------------------------------------------------------


def _pictures(records: Sequence[Record], folder: Path, beside: Path, mixed: bool) -> str:
    """Write the figures to `folder`, those about gates only where there are any; a section that shows them in a report
    that lies `beside`."""
    from lorakit.analysis import figures, gate_figures, style

    records = frame(records)  # once for all figures
    curves = {axis: figures.loss_curve(records, axis, mixed=mixed) for axis in equal_cost.AXES}
    found = {f"loss_by_{x}.png": (f"Validation loss against {AXES[x].label}", drawn) for x, drawn in curves.items()}
    about_gates = {
        "Acceptance rate against its target": gate_figures.acceptance,
        "Novelty of the candidate batches": gate_figures.novelty, "What the compute was spent on": gate_figures.ledger,
    }  # fmt: skip
    for what, draw in about_gates.items():
        with contextlib.suppress(ParameterError):  # no run has what it shows
            found[f"{draw.__name__}.png"] = what, draw(records, mixed)
    text = "\n## Figures\n"
    for name, (what, drawn) in found.items():
        path = Path(os.path.relpath(style.save(drawn, folder / name), beside)).as_posix()
        text += f"\n![{what}]({path})\n\n{what}.\n"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report on the records under RESULTS; nothing is written where they cannot be compared.

    Raises:
        LorakitError: no records, records that cannot be compared, no record of the baseline, or a place that cannot be
            written to.
    """
    parser = argparse.ArgumentParser(prog="lorakit report", description="Compare one setting's rows at equal cost.")
    parser.add_argument("--output", required=True, metavar="FILE", help="the report, in Markdown")
    parser.add_argument("--baseline", default="", metavar="ROW", help="compare with it (default: baseline, else lora)")
    parser.add_argument("--figures", metavar="DIR", help="draw figures there and show them in the report")
    args, records = tables.asked(parser, argv)
    output = Path(args.output)
    require_place(output, "--output")
    if args.figures:
        require_place(args.figures, "--figures", folder=True)
    text = report(records, args.baseline, args.results, args.mixed)  # before anything is written
    with retold(OSError, ParameterError, "--output", args.output, "cannot be written"):
        if args.figures:
            text += _pictures(records, Path(args.figures), output.parent, args.mixed)
        write_text(text, output)
    print(f"{args.output}: {len(records)} runs of {len({record.row for record in records})} rows")
    return 0
