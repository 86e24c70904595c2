"""What the site consists of, without MkDocs: place on the site -> a page's text, or the file that lies there.

The site is `docs/` and the project's folder laid over one another: README is its first page, `docs/batches.md` lies
beside it, notebooks, params files and records where they lie in the project. Made here are the pages of results (from
the committed records), of parameters (from their descriptions) and of the package (mkdocstrings adds its docstrings).
"""

from __future__ import annotations

import posixpath
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

PROJECT = Path(__file__).parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "scripts")]

import site_api  # noqa: E402 (found by the line above)
from matplotlib.figure import Figure  # noqa: E402

import lorakit  # noqa: E402
from lorakit.analysis import figures, gate_figures, stats, style, tables  # noqa: E402
from lorakit.cli import COMMANDS  # noqa: E402
from lorakit.params.overview import capability_table, reference  # noqa: E402
from lorakit.records import AXES, Record  # noqa: E402

RESULTS, PARAMS = PROJECT / "results", PROJECT / "params"
# what stands elsewhere on the site than in the project
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "results/README.md": "results/index.md",
}
LINK = re.compile(r"(!?\[[^\]\n]*\]\()([^)\s]+)(\))")
FEW = 8  # rows that one panel can still tell apart

Drawing = Callable[[], Figure]


# the whole ------------------------------------------------------------------------------------------------------------


@cache
def pages() -> dict[str, str]:
    """Every page that is text, by its place; notebooks are not among them."""
    found = {path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8") for path in _texts()}
    found = {place(name): relinked(text, name) for name, text in found.items()}
    found["results/index.md"] += index_of_results()
    found |= {f"results/{setting}.md": results_page(setting) for setting in settings()}
    found["parameters.md"] = parameters_page()
    found["commands.md"] = commands_page()
    return found | site_api.pages()


def _texts() -> list[Path]:
    return [
        *(PROJECT / name for name in MOVED),
        *sorted((PROJECT / "docs").glob("*.md")),
        *_of_results("*/*.md"),
    ]


def _of_results(*patterns: str) -> list[Path]:
    """Files of `results/` without the folders that the project does not keep."""
    found = sorted(path for pattern in patterns for path in RESULTS.glob(pattern))
    return [path for path in found if path.relative_to(RESULTS).parts[0] not in ignored()]


@cache
def files() -> dict[str, Path]:
    """Every file that lies on the site as it is: notebooks with their outputs, records, params files, figures."""
    found = [PROJECT / "claims.yaml", PROJECT / "LICENSE", *sorted((PROJECT / "notebooks").glob("*.ipynb"))]
    found += sorted(PARAMS.glob("*/*.yaml"))
    found += _of_results("*.csv", "*/*.png", "*/*/*.png", "*/*/*.json")
    return {path.relative_to(PROJECT).as_posix(): path for path in found}


def notebooks() -> dict[str, str]:
    """Place -> title, its first heading."""
    found = {}
    for name, path in files().items():
        if path.suffix == ".ipynb":
            found[name] = re.search(r'"# ([^"\\]+)', path.read_text(encoding="utf-8"))[1]
    return found


@cache
def settings() -> list[str]:
    """The settings that have records which were not made on this machine alone."""
    return sorted({path.parts[-3] for path in _of_results("*/*/*.json")})


@cache
def ignored() -> set[str]:
    """Folders of `results/` that the project does not keep."""
    lines = (PROJECT / ".gitignore").read_text(encoding="utf-8").splitlines()
    return {line.split("/")[1] for line in lines if re.fullmatch(r"results/[^*/]+/", line)}


# links ----------------------------------------------------------------------------------------------------------------


def place(name: str) -> str:
    """Where a file of the project stands on the site; a folder of records has its page there.

    Raises:
        ValueError: nowhere.
    """
    name = MOVED.get(name, name.removeprefix("docs/"))
    folder, _, setting = name.rstrip("/").partition("/")
    if folder == "results" and setting in settings():
        return f"results/{setting}.md"
    if name not in files() and not name.endswith(".md"):
        raise ValueError(f"{name}: not on the site")
    return name


def relinked(text: str, name: str) -> str:
    """The text of the project's file `name` with its links to other files leading to where those stand on the site.

    Raises:
        ValueError: a link to what is not on the site.
    """
    here = posixpath.dirname(place(name))

    def moved(link: re.Match[str]) -> str:
        path, mark, anchor = link[2].partition("#")
        if not path or "://" in path:
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        if not (PROJECT / target).exists():
            raise ValueError(f"{name}: link to {path}, which does not exist")
        return f"{link[1]}{posixpath.relpath(place(target), here or '.')}{mark}{anchor}{link[3]}"

    return LINK.sub(moved, text)


# results --------------------------------------------------------------------------------------------------------------


def index_of_results() -> str:
    """What follows on the page that says how to read records: each setting, how many runs it has, its page."""
    lines = ["", "## Settings with records", "", "| setting | rows | runs | report |", "|---|---:|---:|---|"]
    for setting in settings():
        runs = records(setting).values()
        report = f"[report]({setting}/report.md)" if (RESULTS / setting / "report.md").is_file() else ""
        cells = (f"[`{setting}`]({setting}.md)", str(len({run.row for run in runs})), str(len(runs)), report)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@cache
def records(setting: str, kind: str = "run") -> dict[Path, Record]:
    """The committed records of one kind, by their files."""
    if kind != "all":
        return {path: record for path, record in records(setting, "all").items() if record.kind == kind}
    return {path: lorakit.read(path) for path in sorted((RESULTS / setting).glob("*/*.json"))}


def results_page(setting: str) -> str:
    """One setting: its tables, its figures, and under each the records and params files that it was made from."""
    runs, searches, timings = (records(setting, kind) for kind in ("run", "lr_search", "timing"))
    home = f"[`{setting}`](../params/{setting}/_setting.yaml)"
    parts = [f"# {setting}", f"The runs of the setting {home}, from their records."]
    if (RESULTS / setting / "report.md").is_file():
        parts.append(f"Every comparison at equal cost is in the [report]({setting}/report.md).")
    if runs:
        told = tables.results_table([*runs.values()])
        parts += ["## What each row bought and cost", told.markdown(), sources(runs)]
    if timings:
        told = tables.timing_table([*timings.values()])
        parts += ["## Seconds, beside the reference", tables.Table(told).markdown(), sources(timings)]
    drawn = drawings(setting)
    parts += ["## Figures"] * bool(drawn)
    for name, (caption, found, _) in drawn.items():
        parts += [f"![{caption}]({setting}/drawn/{name}.png)", f"*{caption}.*", sources(found)]
    return "\n\n".join(parts) + "\n"


def sources(found: dict[Path, Record]) -> str:
    """Links to the records and params files of what stands above, folded; a line a row."""
    rows: dict[str, list[Path]] = {}
    for path in found:
        rows.setdefault(path.parent.name, []).append(path)
    lines = []
    for row, paths in rows.items():
        asked = PARAMS / paths[0].parts[-3] / f"{row}.yaml"
        links = [f"[params](../{asked.relative_to(PROJECT).as_posix()})"] if asked.is_file() else []
        links += [f"[{path.stem}]({path.relative_to(RESULTS).as_posix()})" for path in sorted(paths, key=_number)]
        lines.append(f"    - `{row}`: {', '.join(links)}")
    return '??? note "Records and params files"\n\n' + "\n".join(lines)


def _number(path: Path) -> int:
    return int(path.stem[1:]) if path.stem[1:].isdigit() else -1


@cache
def drawings(setting: str) -> dict[str, tuple[str, dict[Path, Record], Drawing]]:
    """Name -> caption, the records that it is drawn from, what draws it; figures about gates where there are any."""
    found: dict[str, tuple[str, dict[Path, Record], Drawing]] = {}

    def add(name: str, caption: str, of: dict[Path, Record], draw: Callable[..., Figure], **options: str) -> None:
        found[name] = caption, of, partial(draw, [*of.values()], **options)

    runs, searches = records(setting), records(setting, "lr_search")
    told = [*runs.values()]
    if len({run.row for run in told}) > FEW:
        for axis in ("accepted_steps", "flops"):
            caption = f"Validation loss against {AXES[axis].label}, a panel for each row"
            add(f"loss_by_{axis}", caption, runs, figures.loss_panels, x=axis)
        add("memory", "Predicted peak memory of a step, by kind", runs, figures.memory_by_kind)
    elif told:
        caption = "Validation loss against accepted steps and training compute, and predicted peak memory by kind"
        add("overview", caption, runs, figures.overview)
    if told:
        value = stats.main_value(told).replace("_", " ")
        add("scores", f"{value[0].upper()}{value[1:]} of each row", runs, figures.final_scores)
    if any(map(gate_figures.gate, told)):
        add("acceptance", "Acceptance rate against its target", runs, gate_figures.acceptance)
        add("ledger", "What the compute was spent on", runs, gate_figures.ledger)
    if gate_figures.scored_novelty(told):
        add("novelty", "Novelty of the candidate batches", runs, gate_figures.novelty)
    if searches:
        add(
            "searches", "Validation loss against learning rate, at equal budget", searches, figures.learning_rate_search
        )
    return found


def draw(setting: str, name: str) -> bytes:
    """A figure of a setting's page, as a PNG file has it."""
    with tempfile.TemporaryDirectory() as folder:
        return style.save(drawings(setting)[name][2](), Path(folder) / f"{name}.png").read_bytes()


# reference ------------------------------------------------------------------------------------------------------------


def parameters_page() -> str:
    return f"""# Parameters

What a run can be told: in a params file, in a notebook's second cell, after `-p` on the command line, in `lorakit.run`.
The same as `lorakit params` prints.

{reference(markdown=True)}

## What goes together

{capability_table()}
"""


def commands_page() -> str:
    lines = [f"| `lorakit {name}` | {text} |" for name, (_, text) in COMMANDS.items()]
    head = "# Commands\n\nEach says more with `--help`.\n\n| command | what it does |\n|---|---|\n"
    return head + "\n".join(lines) + "\n"


# what MkDocs asks -----------------------------------------------------------------------------------------------------


def expanded(nav: list) -> list:
    """MkDocs's `nav` with each "folder/*" replaced by that folder's pages, with their titles."""
    found = []
    for entry in nav:
        if isinstance(entry, str) and entry.endswith("/*"):
            found += _pages_of(entry.removesuffix("*"))
        elif isinstance(entry, dict):
            ((title, inside),) = entry.items()
            found.append({title: expanded(inside) if isinstance(inside, list) else inside})
        else:
            found.append(entry)
    return found


def _pages_of(folder: str) -> list[dict[str, str]]:
    if folder == "notebooks/":
        return [{title: name} for name, title in notebooks().items()]
    found = [name for name in sorted(pages()) if name.startswith(folder) and not name.endswith("index.md")]
    return [{_title(name): name} for name in found]


def _title(name: str) -> str:
    heading = re.match(r"# (.*)", pages()[name])[1]
    return f"{posixpath.dirname(name).rpartition('/')[2]}, report" if name.endswith("/report.md") else heading
