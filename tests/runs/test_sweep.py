"""Sweeps: what is finished is skipped, what failed keeps its notebook and stops nothing, what was cut short goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import light_notebook
import pytest
import yaml
from filelock import FileLock

from lorakit import records
from lorakit.errors import ParameterError
from lorakit.runs import sweep

ROOT = Path(__file__).resolve().parents[2]
SWEEP = "import sys; from lorakit.runs import sweep; sys.exit(sweep.sweep(sweep.plan(sys.argv[1], 'toy')))"


@pytest.fixture
def place(tmp_path):
    """A project of one setting with methods lora, head and full, whose notebook takes a second."""
    light_notebook.write(tmp_path / "notebooks" / "01_lora.ipynb")
    write_params(tmp_path, _setting="rank: 4", lora="# defaults", head="rank: 2", full="# defaults")
    return tmp_path


def write_params(root: Path, **files: str) -> None:
    folder = root / "params" / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text + "\n")


def write_record(run: sweep.Run, status: str) -> bytes:
    record = records.Record(setting=run.setting, method=run.method, seed=run.seed, status=status)
    record.resolved = run.params.model_dump(exclude=sweep.APART)
    return records.write(record, run.record).read_bytes()


def wait_for(place: Path, process: subprocess.Popen, words: str) -> None:
    """Until a run or Snakemake says so in the log."""
    log = place / ".runs" / "toy.log"
    while not log.is_file() or words not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)


def released(place: Path) -> None:
    """Wait until Snakemake and its runs have ended, too."""
    with FileLock(place / ".runs" / ".toy.lock", timeout=120):
        pass


def repair(run: sweep.Run) -> None:
    run.run_dir.mkdir(parents=True, exist_ok=True)
    (run.run_dir / "repaired").touch()


@pytest.mark.parametrize("status", ["done", "diverged", "interrupted", "out_of_memory", "running"])
def test_only_unfinished_runs_are_planned(place, status):
    (run,) = sweep.plan(place, "toy", "lora")
    assert (run.status(), run.finished()) == ("missing", False)
    write_record(run, status)
    assert (run.status(), run.finished()) == (status, status in ("done", "diverged"))


def test_failures_stop_nothing_and_the_next_sweep_finishes_them(place, capfd):
    write_params(place, head="report_to: fail", full="report_to: out_of_memory")
    runs = sweep.plan(place, "toy", "head full lora") + sweep.plan(place, "toy", "lora", "1")
    head, full, lora, old = runs
    before = write_record(old, "done")

    assert sweep.sweep(runs, jobs=2) == 1
    assert [run.status() for run in runs] == ["missing", "out_of_memory", "done", "done"]
    assert light_notebook.errors(head.executed) == ["AssertionError"]
    assert light_notebook.errors(full.executed) == light_notebook.errors(lora.executed) == []
    out, told = capfd.readouterr()
    log = place / ".runs" / "toy.log"
    assert not out and "Building DAG" in log.read_text() and "Building DAG" not in told
    assert f"what Snakemake and the runs say: {os.path.relpath(log)}\n" in told
    lines = told.splitlines()
    ended = [lines.index(f"sweep: {name}") for name in ("toy/full/s0: out_of_memory", "toy/lora/s0: done")]
    assert lines.index("sweep: toy/head/s0: missing") < len(lines) and max(ended) < len(lines) - 2
    assert "4 runs: 1 finished before, 3 to do" in told
    assert f"toy/head/s0: missing: see {os.path.relpath(head.executed)}" in told

    for run in runs:
        repair(run)
    finished = lora.record.read_bytes()
    assert sweep.sweep(runs, jobs=2) == 0
    assert {run.status() for run in runs} == {"done"}
    assert (old.record.read_bytes(), lora.record.read_bytes()) == (before, finished)
    assert not old.executed.exists()  # never run
    assert sweep.sweep(runs) == 0
    assert "4 finished before, 0 to do" in capfd.readouterr().err


def test_the_view_of_a_sweep_follows_its_log_and_records(place, capsys):
    full, head, lora, done = runs = sweep.plan(place, "toy") + sweep.plan(place, "toy", "lora", "1")
    write_record(done, "done")
    said = [
        "Building DAG of jobs...\ntoy/full s0    5% of 60 steps  loss 2\ntoy/head s0  evaluating\n",
        "toy/full s0   50% of 60 steps  loss 2\ntoy/head s0   20% of 60 steps\ntoy/lora s0   90% of 60 steps\n",
        "toy/full s0  evaluating\n",
        f"RuleException:\nCommand '… --output {head.executed} -p record={head.record}' returned 1\n",
    ]
    shown, process = [], SimpleNamespace(returncode=None)
    view = SimpleNamespace(style="bar", update=lambda *seen, spent: shown.append((*seen, spent)))
    view.close = lambda: shown.append("closed")
    log = sweep._log(runs)
    log.parent.mkdir()
    log.touch()

    def wait(_):
        with log.open("a") as file:
            file.write(said.pop(0))
        if len(said) == 1:
            write_record(lora, "done")
        if said:
            raise subprocess.TimeoutExpired("snakemake", 1)
        process.returncode = 1

    process.wait = wait
    sweep._watch(process, runs, [full, head, lora], view)
    *seen, closed = shown
    assert closed == "closed" and [(facts, spent) for _, facts, spent in seen] == [
        ({"full s0": "5%"}, 1),
        ({"full s0": "50%", "head s0": "20%", "lora s0": "90%"}, 1),
        ({"full s0": "50%", "head s0": "20%"}, 2),
        ({"full s0": "50%"}, 3),
    ]
    assert [share for share, *_ in seen] == pytest.approx([1.05 / 4, 2.6 / 4, 2.7 / 4, 3.5 / 4])
    lines = ["toy/lora/s0: done", "toy/head/s0: missing"]
    assert capsys.readouterr().err.splitlines() == [f"sweep: {line}" for line in lines]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_was_stopped_goes_on(place, number):
    write_params(place, full="report_to: wait")
    runs = sweep.plan(place, "toy")
    waiting = runs[0]
    assert waiting.method == "full"
    command = [sys.executable, "-c", SWEEP, str(place)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **streams, start_new_session=True) as process:
        wait_for(place, process, "working on full")
        os.killpg(process.pid, number)
        told = process.stderr.read()
    released(place)
    assert process.returncode != 0
    assert ("sweep: stopping: the runs at work finish their records\n" in told) == (number == signal.SIGINT)
    assert waiting.status() == ("interrupted" if number == signal.SIGINT else "missing")
    assert waiting.executed.is_file()

    repair(waiting)
    assert sweep.sweep(runs) == 0
    assert {run.status() for run in runs} == {"done"}


def test_changed_params_are_told_and_the_record_is_kept(place, capsys):
    runs = sweep.plan(place, "toy", "lora")
    before = write_record(runs[0], "done")
    assert sweep.stale(runs) == []
    write_params(place, lora="rank: 16")
    assert sweep.sweep(runs) == 0
    told = capsys.readouterr().err
    assert "lora/s0.json is kept" in told and "rank: 4 then, 16 now" in told and "rm it" in told
    assert runs[0].record.read_bytes() == before


def test_two_sweeps_of_a_setting_do_not_meet(place):
    runs = sweep.plan(place, "toy", "lora")
    (place / ".runs").mkdir()
    with FileLock(place / ".runs" / ".toy.lock"), pytest.raises(ParameterError, match="SETTING='toy': another sweep"):
        sweep.sweep(runs)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_leaves_no_snakemake_beside_a_free_lock(place, number):
    write_params(place, full="report_to: wait")
    runs = sweep.plan(place, "toy", "full")
    with subprocess.Popen([sys.executable, "-c", SWEEP, str(place)], stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        try:
            wait_for(place, process, "working on full")
            os.kill(process.pid, number)  # it alone
            if number == signal.SIGKILL:
                process.wait()
            with pytest.raises(ParameterError, match="another sweep"):
                sweep.sweep(runs)
        finally:
            os.killpg(process.pid, signal.SIGINT if number == signal.SIGTERM else signal.SIGKILL)
    released(place)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [({"setting": "tyo"}, "SETTING='tyo': must be one of toy"), ({"setting": "toy", "seeds": "-1"}, "seed=-1"),
     ({"setting": "toy", "methods": "lora hed"}, "METHODS='hed': toy has bad, full, head, lora"),
     ({"setting": "toy", "seeds": "0 x"}, "SEEDS='0 x'"),
     ({"setting": "toy", "methods": "bad"}, "learning_rate='fast'")],
)  # fmt: skip
def test_bad_input_is_told_before_anything_runs(place, asked, complaint):
    write_params(place, bad="learning_rate: fast")
    with pytest.raises(ParameterError, match=complaint):
        sweep.plan(place, **{"methods": "lora"} | asked)
    assert not (place / "results").exists()


@pytest.mark.parametrize(("jobs", "threads", "cores"), [(1, 8, 8), (2, 4, 8), (3, 2, 6), (16, 1, 16)])
def test_runs_at_once_share_the_cores(place, monkeypatch, jobs, threads, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    command = sweep._snakemake(sweep.plan(place, "toy"), jobs, ROOT / "profiles" / "default")
    assert f"threads={threads}" in command
    assert command[command.index("--cores") + 1] == str(cores)


def planned(place: Path, *arguments: str, python: str = sys.executable) -> str:
    """What snakemake by itself says that it would do."""
    command = [python, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(place)]
    done = subprocess.run([*command, "--dry-run", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_snakemake_by_itself_plans_what_is_unfinished(place, profile):
    for run in sweep.plan(place, "toy", "head"):
        write_record(run, "diverged")
    arguments = ["--workflow-profile", str(ROOT / "profiles" / profile), "--cores", "2"]
    assert "fine_tune        5" in planned(place, *arguments, "--config", "setting=toy", "seeds=0 1")
    assert not (place / "results/toy/lora").exists()


def test_a_python_whose_path_holds_a_space_is_quoted(place, tmp_path):
    environment = tmp_path / "a space"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (environment / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (environment / "lib").symlink_to(Path(sys.prefix) / "lib")
    python = str(environment / "bin" / "python")
    arguments = ["--workflow-profile", "none", "--printshellcmds", "--cores", "1"]
    arguments += ["--config", "setting=toy", "methods=lora"]
    assert f"'{python}' -m lorakit run" in planned(place, *arguments, python=python)


def test_slurm_profile_behaves_as_the_local_one():
    folder = ROOT / "profiles"
    local, slurm = (yaml.safe_load((folder / name / "config.yaml").read_text()) for name in ("default", "slurm"))
    del local["quiet"]
    assert slurm["executor"] == "slurm"
    assert slurm.items() >= local.items()
