"""`lorakit COMMAND …`, one command line: what a command needs is imported only when it is called."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lorakit.errors import AssetError, LorakitError, require

COMMANDS = {  # name -> the module whose `main` it is (empty: the function of this name below), what it does
    "demo": ("", "the README's run: every method on a real encoder; a table, a figure, a page, a verdict"),
    "run": ("lorakit.runs.notebooks", "run a notebook with parameters: lorakit run NOTEBOOK -f params.yaml -p seed=1"),
    "train": ("", "the same run without a notebook: lorakit train -f params.yaml -p record=out.json"),
    "sweep": ("lorakit.runs.sweep", "every run of a setting that has no finished record: lorakit sweep --setting toy"),
    "search": ("", "search the learning rate on validation data: lorakit search -f params.yaml"),
    "table": ("lorakit.analysis.tables", "compare records: lorakit table results/… --figure out.png"),
    "report": ("lorakit.analysis.report", "rows at equal cost: lorakit report results/… --output report.md"),
    "time": ("lorakit.runs.timing", "seconds of a step and an answer, rows in turns: lorakit time sst2-minilm-compare"),
    "claims": (
        "lorakit.analysis.claims",
        "what the runs say of each claim: lorakit claims --setting sst2-minilm-compare",
    ),
    "params": ("lorakit.params.overview", "every parameter of a run: its default, its range, what it means"),
    "plan": ("lorakit.runs.fits", "will it fit: lorakit plan MODEL --gpu 24 --method lora --batch 4 --seq 2048"),
    "fetch": ("", "download public models and data for offline use: lorakit fetch NAME"),
    "export": ("", "an adapter merged into its base, as a plain model: lorakit export ADAPTER --merge --output FOLDER"),
    "scratch": ("lorakit.scratch", "LoRA from scratch on a small transformer of our own"),
}
DEMO = {"setting": "reviews-minilm", "assets": ("all-MiniLM-L6-v2", "review-sentences")}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 it failed or was stopped, 2 bad input, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # ± and × on a terminal that knows ASCII only
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:{max(map(len, COMMANDS))}}  {text}" for name, (_, text) in COMMANDS.items()]
        print("\n".join(["usage: lorakit COMMAND …", "", *lines]))
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"lorakit: {name!r} is not a command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = COMMANDS[name][0]
    try:
        status = (import_module(module).main if module else globals()[name])(rest)
        sys.stdout.flush()
        return status
    except LorakitError as error:
        print(f"lorakit {name}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"lorakit {name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # a closed pipe, a full disk
        with contextlib.suppress(OSError):
            print(f"lorakit {name}: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):  # else Python tries once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def train(argv: Sequence[str]) -> int:
    """Run once; exit status 0 when done, 1 when the run diverged, ran out of memory or failed."""
    given = _given("train", argv)
    from lorakit.analysis.tables import results_table
    from lorakit.runs.experiment import MADE, run

    record = run(given)
    if os.environ.get("RANK", "0") == "0":  # under `accelerate launch` one process speaks for all
        print(results_table([record]))
        made = [path for name in MADE if (path := Path(given.get("run_dir") or os.devnull) / name).is_dir()]
        if record.status == "done":
            print(f"trained weights: {' and '.join(map(str, made)) or 'not kept; -p run_dir=FOLDER keeps them'}")
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
    from lorakit.files import PROJECT
    from lorakit.records import read_all
    from lorakit.runs import notebooks, sweep

    parser = argparse.ArgumentParser(prog="lorakit demo", description=demo.__doc__)
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=cores, help="runs at once, on shared cores (default: %(default)s)")
    parser.add_argument("--seeds", default="", help="separated by spaces (default: 0)")
    asked = parser.parse_args(argv)
    runs = sweep.plan(PROJECT, DEMO["setting"], seeds=asked.seeds)
    for name in DEMO["assets"]:
        assets.fetch(name)
    status = sweep.sweep(runs, asked.jobs)
    folder = os.path.relpath(PROJECT / "results" / DEMO["setting"])
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
            more = [f"{'':22s} {line}" for line in (asset.terms, *asset.notes)]
            print("\n".join([f"{asset.name:22s} {where}", *more]))
    else:
        for name in options.names:
            print(f"{name}: {assets.fetch(name)}")
    return 0


def export(argv: Sequence[str]) -> int:
    """Merge an adapter into its base and write a plain model, with its tokenizer, that `from_pretrained` reads."""
    from transformers import AutoConfig

    from lorakit import adapters, models
    from lorakit.adapters.storage import described

    parser = argparse.ArgumentParser(prog="lorakit export", description=export.__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder that save_adapter, a run or PEFT wrote")
    parser.add_argument("--merge", action="store_true", required=True, help="an adapter alone is as PEFT reads it")
    parser.add_argument("--base", help="the base model; else as the adapter's config says")
    parser.add_argument("--kind", choices=["classify", "masked", "causal"], help="else as the adapter's config says")
    parser.add_argument("--output", metavar="FOLDER", help="new or empty (default: ADAPTER-merged)")
    options = parser.parse_args(argv)
    base, kind, labels = described(options.adapter)
    base, kind = options.base or base, options.kind or kind
    for name, value in (("--base", base), ("--kind", kind)):
        require(bool(value), name, value, f"{options.adapter} does not say it: give {name}")
    named = labels and (Path(options.adapter) / "config.json").is_file()  # of a run on own data: its classes' names
    classes = [*AutoConfig.from_pretrained(options.adapter).id2label.values()] if named else []
    loaded = models.load(base, kind, num_labels=labels or 2, classes=classes, dtype="auto")
    model = adapters.load_adapter(loaded.model, options.adapter)
    folder = adapters.export(model, options.output or f"{options.adapter.rstrip('/')}-merged")
    loaded.tokenizer.save_pretrained(folder)
    print(f"{folder}: {base} with {options.adapter} merged in")
    return 0
