"""A sweep: every method x seed of a setting that has no finished record yet, through Snakemake."""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorakit import records
from lorakit.errors import LorakitError, ParameterError, require, retold
from lorakit.fields import APART, flagged
from lorakit.files import HOME, PROJECT, alone
from lorakit.params import Params, resolve
from lorakit.params import given as given_by
from lorakit.params.files import Resources, resources
from lorakit.params.whole import notebook_of
from lorakit.progress import Progress
from lorakit.quiet import answering
from lorakit.runs.notebooks import FINISHED

# in a sweep's log: how far a run is, as `Progress` writes it
SHARE = re.compile(r"\S+/(\S+ s\d+)  +(\d+)% of ")
LOGS = Path(".runs/.slurm")  # as profiles/slurm says
LOCAL = "default"  # the profile of this machine


@dataclass(frozen=True)
class Run:
    """params/<setting>/<method>.yaml at one seed, and the places that follow from it; `method` is the row."""

    root: Path
    setting: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.method}/s{self.seed}"

    @property
    def record(self) -> Path:
        return self.root / "results" / f"{self.name}.json"

    @property
    def executed(self) -> Path:
        return self.record.with_suffix(".ipynb")

    @property
    def run_dir(self) -> Path:
        return self.root / ".runs" / self.name

    @property
    def slurm_log(self) -> Path | None:
        """The newest log of a SLURM job of its own, or of the job that its record names."""
        logs = [*(self.root / LOGS).glob(f"*/{self.setting}_{self.method}_{self.seed}/*.log")]
        with contextlib.suppress(LorakitError):
            logs += (self.root / LOGS).rglob(f"{records.read(self.record).environment.get('slurm_job')}.log")
        return max(logs, key=os.path.getmtime, default=None)

    @property
    def notebook(self) -> Path:
        return _source(self.root) / "notebooks" / notebook_of(self.params)

    @property
    def files(self) -> list[Path]:
        """The params files, later ones winning."""
        folder = _source(self.root) / "params" / self.setting
        return [folder / "_setting.yaml", folder / f"{self.method}.yaml"]

    @property
    def params(self) -> Params:
        """What the params files ask for."""
        return resolve(given_by(self.files, []) | {"setting": self.setting, "row": self.method, "seed": self.seed})

    @property
    def resources(self) -> Resources:
        """What the params files ask a scheduler for."""
        return resources(self.files)

    def status(self) -> str:
        """Of the record; "missing" where there is none that can be read."""
        try:
            return records.read(self.record).status
        except LorakitError:
            return "missing"

    def finished(self) -> bool:
        return self.status() in FINISHED

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Parameter -> (what the record was made with, what the params files say now), where they differ."""
        from lorakit.tasks.registry import recipe

        resolved, apart = records.read(self.record).resolved, flagged(Params, APART)
        now = self.params  # read from its files at every look
        before = {"loss": now.loss if recipe(now.task).form == "labelled" else "nll"}  # records older than it
        was = Params(**before | {name: value for name, value in resolved.items() if name in Params.model_fields})
        pairs = {name: (getattr(was, name), getattr(now, name)) for name in Params.model_fields}
        return {name: pair for name, pair in pairs.items() if name not in apart and pair[0] != pair[1]}


def _source(root: Path) -> Path:
    """Where params and notebooks are read: a working folder's own, anywhere else those that the package brings."""
    return root if (root / "params").is_dir() and root != HOME else PROJECT


def plan(root: str | Path, setting: str, methods: str = "", seeds: str = "") -> list[Run]:
    """Every run asked for, finished or not.

    Args:
        root: gets `results/`; has `params/` and `notebooks/`, else those of the package are read.
        methods: separated by spaces; empty: every method of the setting.
        seeds: separated by spaces; empty: 0.

    Raises:
        ParameterError: an unknown setting or method, a seed that is no number, a params file that is not valid.
    """
    root = Path(root).resolve()
    params = _source(root) / "params"
    settings = sorted(path.parent.name for path in params.glob("*/_setting.yaml"))
    there = ", ".join(settings) or f"none: {root} has no params/; `lorakit init FOLDER` makes a folder that has"
    require(setting in settings, "SETTING", setting, f"must be one of {there}")
    known = sorted(path.stem for path in params.glob(f"{setting}/[!_]*.yaml"))
    chosen = methods.split() or known
    for method in chosen:
        require(method in known, "METHODS", method, f"{setting} has {', '.join(known)}")
    with retold(ValueError, ParameterError, "SEEDS", seeds, "must be whole numbers separated by spaces"):
        numbers = [*dict.fromkeys(map(int, seeds.split() or ["0"]))]
    require(find_spec("snakemake") is not None, "SETTING", setting, "needs Snakemake: pip install 'lorakit[sweep]'")
    runs = [Run(root, setting, method, seed) for seed in numbers for method in chosen]
    for run in runs:
        _ = run.params, run.resources  # a bad file is told before any run starts
    return runs


def stale(runs: list[Run]) -> list[str]:
    """One line for each finished record whose params files have changed since."""
    lines = []
    for run in runs:
        if run.finished() and (changed := run.differences()):
            shown = ", ".join(f"{name}: {was!r} then, {now!r} now" for name, (was, now) in changed.items())
            path = os.path.relpath(run.record)
            lines.append(f"{path} is kept but its params files changed ({shown}); rm it to run it again")
    return lines


def sweep(runs: list[Run], jobs: int | None = None, profile: str = LOCAL) -> int:
    """Run what is not finished; 0 when every record is finished at the end.

    Args:
        jobs: at once, or submitted at once; None: 1, or as many as the profile says.
        profile: a folder of profiles/, or a path: how Snakemake runs them.

    Raises:
        ParameterError: there is no such profile, no job at once, or another sweep of the setting is at work.
    """
    require(jobs is None or jobs >= 1, "JOBS", jobs, "must be at least 1")
    places = (PROJECT / "profiles" / profile, Path(profile).absolute())
    folder = next((place for place in places if (place / "config.yaml").is_file()), None)
    require(folder is not None, "PROFILE", profile, "must be default, slurm, or a folder with a config.yaml")
    pending = [run for run in runs if not run.finished()]
    _say(f"{len(runs)} runs: {len(runs) - len(pending)} finished before, {len(pending)} to do")
    if pending:
        progress = Progress(runs[0].setting, len(runs), "runs")  # what it refuses is told before anything starts
        lock = runs[0].root / ".runs" / f".{runs[0].setting}.lock"
        with alone(lock, "SETTING", runs[0].setting, "another sweep of it") as held, _log(runs).open("wb") as log:
            _say(f"what Snakemake and the runs say: {os.path.relpath(log.name)}")
            streams = {"stdout": log, "stderr": subprocess.STDOUT, "pass_fds": [held]}  # it holds the lock, too
            process = subprocess.Popen(_snakemake(pending, jobs, folder), cwd=runs[0].root, **streams)
            # Ctrl-C reaches Snakemake and its runs directly, which then finish their records; SIGTERM is passed on
            passed_on = answering(lambda *_: process.terminate(), signal.SIGTERM)
            stopping = answering(lambda *_: _say("stopping: the runs at work finish their records"), signal.SIGINT)
            with stopping, passed_on:
                _watch(process, runs, pending, progress)
    for line in stale(runs):
        _say(f"warning: {line}")
    unfinished = [run for run in pending if not run.finished()]
    for run in unfinished:
        seen = [path for path in (run.executed, run.slurm_log) if path and path.is_file()] or [_log(runs)]
        shown = " and ".join(map(os.path.relpath, seen))
        _say(f"{run.name}: {run.status()}: see {shown}; the same command goes on from here")
    return 1 if unfinished else 0


def _written(run: Run) -> int:
    """When its record was, in ns; 0 where there is none."""
    return run.record.stat().st_mtime_ns if run.record.is_file() else 0


def _log(runs: list[Run]) -> Path:
    return runs[0].root / ".runs" / f"{runs[0].setting}.log"


def _watch(process: subprocess.Popen, runs: list[Run], pending: list[Run], progress: Progress) -> None:
    """Until Snakemake ends: a line for every run that does and, in a terminal, how far the others are."""
    left, shares = {run: _written(run) for run in pending}, {}
    with contextlib.closing(progress), _log(runs).open(encoding="utf-8", errors="replace") as said:
        while process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            lines = said.readlines()
            failed = "".join(line for line in lines if line.startswith("Command "))  # what left no record, too
            shares |= {found[1]: int(found[2]) for line in lines if (found := SHARE.match(line))}
            for run in [run for run, before in left.items() if _written(run) != before or str(run.record) in failed]:
                del left[run]
                _say(f"{run.name}: {run.status()}")
            if progress.style == "bar":
                facts = {name: f"{shares[name]}%" for run in left if (name := f"{run.method} s{run.seed}") in shares}
                ended = len(runs) - len(left)
                progress.update((ended + sum(map(shares.get, facts)) / 100) / len(runs), facts, spent=ended)


def _snakemake(pending: list[Run], jobs: int | None, profile: Path) -> list[str]:
    settings = {
        "setting": pending[0].setting,
        "methods": " ".join(dict.fromkeys(run.method for run in pending)),
        "seeds": " ".join(dict.fromkeys(str(run.seed) for run in pending)),
    }
    if profile == PROJECT / "profiles" / LOCAL:
        settings["threads"] = threads = max(1, (os.cpu_count() or 1) // (jobs or 1))
        how = ["--cores", str(threads * (jobs or 1))]
    else:
        how = ["--jobs", str(jobs)] if jobs else []
        if (together := min(run.resources.together for run in pending)) > 1:
            settings["shared"] = 1
            how += ["--groups", "fine_tune=runs", "--group-components", f"runs={together}"]
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--nolock"),
        *("--directory", str(pending[0].root), "--workflow-profile", str(profile)),
        *(*how, "--config", *(f"{name}={value}" for name, value in settings.items())),
    ]


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed pipe ends no run
        print(f"sweep: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """`make sweep`. Exit status: 0 all finished, 1 some are not."""
    parser = argparse.ArgumentParser(prog="lorakit sweep", description=main.__doc__)
    parser.add_argument("--setting", required=True, help="a folder of params/")
    parser.add_argument("--methods", default="", help="separated by spaces (default: all of the setting)")
    parser.add_argument("--seeds", default="", help="separated by spaces (default: 0)")
    parser.add_argument("--jobs", type=int, help="runs at once, on shared cores (default: 1), or submitted at once")
    parser.add_argument("--profile", default=LOCAL, help="a folder of profiles/, or a path: slurm submits the runs")
    arguments = parser.parse_args(argv)
    return sweep(plan(HOME, arguments.setting, arguments.methods, arguments.seeds), arguments.jobs, arguments.profile)
