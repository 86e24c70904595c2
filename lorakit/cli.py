"""`lorakit COMMAND …`, one command line: what a command needs is imported only when it is called."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from lorakit import __version__
from lorakit.errors import AssetError, LorakitError

# name -> the module whose `main`, or `:function`, it is (empty: of this name below); what it does
COMMANDS = json.loads((Path(__file__).with_name("configs") / "commands.json").read_text(encoding="utf-8"))
DEMO = {"setting": "reviews-minilm", "assets": ("all-MiniLM-L6-v2", "review-sentences")}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 it failed or was stopped, 2 bad input, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, as by `>&-`: else a file of ours would get its number
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if hasattr(getattr(sys, stream), "reconfigure"):
            getattr(sys, stream).reconfigure(errors="replace")  # ± and × on a terminal that knows ASCII only
    try:
        try:
            return _called(argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except LorakitError as error:
        status, told = error.status, str(error)
    except KeyboardInterrupt:
        status, told = 130, "interrupted"
    except OSError as error:  # a closed pipe, a full disk; Ctrl-C ends the pipe's reader too, often first
        stopped = isinstance(error.__context__, KeyboardInterrupt)
        status, told = (130, "interrupted") if stopped else (1, str(error))
        _unheard(sys.stdout)
    try:
        print(f"lorakit {' '.join(argv[:1])}: {told}", file=sys.stderr, flush=True)
    except OSError:
        _unheard(sys.stderr)
    return status


def _unheard(stream: TextIO) -> None:
    """From here on nobody hears it, else Python tries once more as it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _called(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:{max(map(len, COMMANDS))}}  {text}" for name, (_, text) in COMMANDS.items()]
        print("\n".join(["usage: lorakit COMMAND …", "", *lines]))
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        print(f"lorakit {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"lorakit: {name!r} is not a command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    return (getattr(import_module(f"lorakit.{module}"), function or "main") if module else globals()[name])(rest)


def train(argv: Sequence[str]) -> int:
    """Run once; exit status 0 when done, 1 when the run diverged, ran out of memory or failed."""
    given = _given("train", argv)
    from lorakit.analysis.tables import results_table
    from lorakit.params import resolve
    from lorakit.runs.experiment import MADE, run

    asked, speaks = resolve(given), os.environ.get("RANK", "0") == "0"  # one for all under `accelerate launch`
    if speaks:
        print(f"learning rate {asked.learning_rate:.1e}, from {asked.learning_rate_from or 'no search'}", flush=True)
    record = run(given)
    if speaks:
        print(results_table([record]))
        folder = Path(given.get("run_dir") or os.devnull).expanduser()
        made = [path for name in MADE if (path := folder / name).is_dir()]
        if record.status == "done":
            print(f"trained weights: {' and '.join(map(str, made)) or 'not kept; -p run_dir=FOLDER keeps them'}")
        if earlier := sorted(folder.glob("earlier-*")):
            print(f"what earlier runs left there: {', '.join(map(str, earlier))}")
    if record.message:
        print(f"{record.status}: {record.message}")
    return 0 if record.status == "done" else 1


def search(argv: Sequence[str]) -> int:
    """Search the learning rate; prints every rate's validation loss and the best."""
    given = _given("search", argv)
    from lorakit.runs import search as lr_search

    record = lr_search.search(given)
    for point in record.search:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in (point.validation or {}).items())
        print(f"learning rate {point.learning_rate:.1e}  {point.status:9s}  {shown}")
    print(f"best: learning_rate: {lr_search.best_rate(record):.1e}")
    return 0


def _given(command: str, argv: Sequence[str]) -> dict[str, Any]:
    """Parameters from files and overrides."""
    epilog = "`lorakit params` lists every parameter: its default, its range, what it means."
    parser = argparse.ArgumentParser(prog=f"lorakit {command}", description=globals()[command].__doc__, epilog=epilog)
    option = {"action": "append", "default": []}
    parser.add_argument("-f", dest="files", metavar="PARAMS.yaml", help="later files win", **option)
    told = "wins over files; -p setting=sst2-minilm -p row=lora asks for a row"
    parser.add_argument("-p", dest="overrides", metavar="NAME=VALUE", help=told, **option)
    from lorakit import params

    return params.given(**vars(parser.parse_args(argv)))


def demo(argv: Sequence[str]) -> int:
    """Every method on a real encoder and real sentences: run what is not finished; a table, a page, a verdict."""
    from lorakit import assets
    from lorakit.analysis import fronts, tables
    from lorakit.files import HOME, PROJECT, RESULTS
    from lorakit.records import read_all
    from lorakit.runs import notebooks, sweep

    parser = argparse.ArgumentParser(prog="lorakit demo", description=demo.__doc__)
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=cores, help="runs at once, on shared cores (default: %(default)s)")
    parser.add_argument("--seeds", default="", help="separated by spaces (default: 0)")
    asked = parser.parse_args(argv)
    runs = sweep.plan(HOME, DEMO["setting"], seeds=asked.seeds)
    for name in DEMO["assets"]:
        assets.fetch(name)
    status = sweep.sweep(runs, asked.jobs)
    folder = os.path.relpath(RESULTS / DEMO["setting"])
    if any(run.status() == "done" for run in runs):
        tables.main([folder, "--figure", f"{folder}/overview.png"])
        print(f"\nrecords and executed notebooks: {folder}/*/s*.*\nfigure: {folder}/overview.png", flush=True)
        compared, about = f"{folder}/compare.ipynb", {"setting": DEMO["setting"], "row": "lora"}
        notebooks.run_notebook(PROJECT / "notebooks" / "20_compare.ipynb", compared, about, progress=False)
        print(f"all of it, on one page: {os.path.relpath(notebooks.page(compared))}\n")
        print(fronts.verdict(read_all(folder)), flush=True)
    return status


def fetch(argv: Sequence[str]) -> int:
    """Fetch offline assets into the user's cache, list them or check them.

    Raises:
        LorakitError: unknown name, failed download, or damage found by --verify.
    """
    from lorakit import assets

    parser = argparse.ArgumentParser(prog="lorakit fetch", description="Fetch offline assets into the user's cache.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(assets.ASSETS)}")
    parser.add_argument("--list", action="store_true", help="what there is, what is cached, under which terms")
    parser.add_argument("--verify", action="store_true", help="read every byte of what is cached and compare hashes")
    options = parser.parse_args(argv)
    found = {name: assets.path(name) for name in options.names or assets.ASSETS}  # an unknown name is an error
    if options.verify:
        names = options.names or [name for name, folder in found.items() if folder]
        broken = {name: files for name in names if (files := assets.verify(name))}
        for name in names:
            print(f"{name}: {'whole' if name not in broken else 'damaged: ' + ', '.join(broken[name])}")
        if broken:
            folders = ", ".join(str(assets.cache.root() / name) for name in broken)
            raise AssetError(f"{', '.join(broken)}: not whole; remove {folders} and run `lorakit fetch` again")
    elif options.list or not options.names:
        for asset in assets.ASSETS.values():
            where = assets.path(asset.name) or f"not cached, {asset.size / 1e6:.0f} MB to download"
            print(f"{asset.name:22s} {where}", *(f"{'':22s} {line}" for line in (asset.terms, *asset.notes)), sep="\n")
    else:
        for name in options.names:
            print(f"{name}: {assets.fetch(name)}")
    return 0
