"""profiles/slurm on a real SLURM: what it kills stops nothing and resumes bitwise; short runs share jobs; two GPUs.

`make slurm`: half an hour of two busy cores, as root, with Debian's `slurm-wlm` and `munge`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import light_notebook
import pytest
from faults import toy_run
from slurm import loopback

from lorakit import records

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 3600  # seconds that one wait may take; no test asserts a time
SETTING = """\
batch_size: 4
max_train: 64
max_validation: 4
max_test: 4
budget: 4
evaluations: 2
latency_repeats: 0
predict_memory: false
save_steps: 5
rank: 2
resources: {gpus: 0, cpus: 1, memory: 3, hours: 2}
"""
ROWS = {name: "# as the method is" for name in ("lora", "head", "hira", "full")} | {
    "skip": "skip: prefix", "qlora": "quantize: nf4", "random": "gate: random\ngate_burn_in: 2", "targets": "rank: 4",
    "floor": "gate: loss_floor\ngate_burn_in: 2",
    "late": "compares: full_length\nbudget: 200", "cancelled": "compares: full_length\nbudget: 300",
    "large": "dropout: 0.1\nresources: {memory: 0.4}",
}  # fmt: skip

RUN = "import lorakit\nfrom lorakit import params\nrecord = lorakit.run(params.collect(globals()))\n"

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * LONGEST)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    if reason := loopback.missing():
        pytest.skip(reason)
    with loopback.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def folder(place: Path, setting: str, rows: dict[str, str], body: str) -> Path:
    """A working folder whose one setting is called toy, and whose notebooks do no more than `body`."""
    (place / "params/toy").mkdir(parents=True)
    for name, text in ({"_setting": setting} | rows).items():
        (place / f"params/toy/{name}.yaml").write_text(text + "\n")
    shutil.copytree(ROOT / "params/accelerate", place / "params/accelerate")
    shutil.copytree(ROOT / "profiles", place / "profiles")
    shutil.copy(ROOT / "Snakefile", place)
    for path in (ROOT / "notebooks").glob("0*.ipynb"):
        light_notebook.write(place / "notebooks" / path.name, body=body)
    return place


@pytest.fixture
def sweep() -> Iterator[Callable[..., subprocess.Popen]]:
    """The command behind `make sweep` in a place and an environment; what it says goes to a file beside."""
    started: list[subprocess.Popen] = []

    def start(place: Path, environment: dict[str, str], *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "lorakit", "sweep", "--setting", "toy", *more]
        here = {"LORAKIT_HOME": str(place), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (place / "said.txt").open("a") as told:
            options = {"cwd": place, "env": environment | here, "stdout": told, "stderr": told}
            started.append(subprocess.Popen(command, **options, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:  # Snakemake, which is in its session, would ask a SLURM that is gone for ever
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said(place: Path) -> str:
    return (place / "said.txt").read_text()


def until(condition: Callable[[], object], process: subprocess.Popen, place: Path) -> None:
    deadline = time.monotonic() + LONGEST
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, said(place)
        time.sleep(0.5)


def submitted(place: Path) -> list[str]:
    """The jobs of the newest sweep, by SLURM's numbers."""
    log = place / ".runs/toy.log"
    return re.findall(r"SLURM jobid (\d+)", log.read_text()) if log.is_file() else []


def job_of(place: Path, row: str) -> str:
    """The newest job of a row's own."""
    return max((path.stem for path in (place / ".runs/.slurm").glob(f"*/toy_{row}_0/*.log")), key=int)


def saved(place: Path, row: str) -> bool:
    return any((place / ".runs/toy" / row / "s0").glob("checkpoint-*"))


def kernel(job: str) -> int:
    """The process in which a job trains."""
    for folder in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            variables = (folder / "environ").read_bytes().split(b"\0")
            if b"ipykernel" in (folder / "cmdline").read_bytes() and f"SLURM_JOB_ID={job}".encode() in variables:
                return int(folder.name)
    raise AssertionError(f"job {job} has no kernel")


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Inside, the process does nothing; afterwards there is none."""
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def statuses(place: Path) -> dict[str, str]:
    return {path.parent.name: records.read(path).status for path in place.glob("results/toy/*/s0.json")}


def state(environment: dict[str, str], job: str) -> str:
    command = ["squeue", "--states=all", "--noheader", "--format=%T", f"--jobs={job}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def test_a_sweep_outlives_what_the_scheduler_kills_and_the_next_one_finishes(cluster, sweep, tmp_path):
    place = folder(tmp_path / "here", SETTING, ROWS, RUN)
    first = sweep(place, cluster, "--profile", "slurm")
    left = {"late", "cancelled"}
    with contextlib.ExitStack() as hanging:
        while left:
            until(lambda: any(saved(place, row) for row in left), first, place)
            left.remove(row := next(row for row in left if saved(place, row)))
            if row == "late":  # it hangs, so it is never done before its minute is over
                hanging.enter_context(stopped(kernel(job_of(place, row))))
                kill = ["scontrol", "update", f"JobId={job_of(place, row)}", "TimeLimit=1"]
            else:
                kill = ["scancel", job_of(place, row)]
            subprocess.run(kill, env=cluster, check=True)
        until(lambda: state(cluster, job_of(place, "late")) == "TIMEOUT", first, place)
    assert first.wait(LONGEST) == 1, said(place)
    assert len(submitted(place)) == len(ROWS) == 12
    killed = {row: job_of(place, row) for row in ("late", "cancelled", "large")}
    ends = {row: state(cluster, job) for row, job in killed.items()}
    assert ends["late"] == "TIMEOUT" and ends["cancelled"] == "CANCELLED", ends
    assert ends["large"] in ("OUT_OF_MEMORY", "FAILED", "CANCELLED"), ends
    log = next((place / ".runs/.slurm").rglob(f"{killed['large']}.log"))
    assert "exceeded memory limit" in log.read_text()
    assert statuses(place).get("cancelled") == "interrupted"  # it was told to stop, and had the time to say so
    done = {row for row, status in statuses(place).items() if status == "done"}
    assert done == ROWS.keys() - killed.keys(), (statuses(place), said(place))
    for row in killed:  # each is told with its log
        assert re.search(rf"toy/{row}/s0: \w+: see .*{killed[row]}\.log", said(place)), said(place)
    for row in done:  # each record names its job, which names its log
        job = records.read(place / f"results/toy/{row}/s0.json").environment["slurm_job"]
        assert f"toy_{row}_0" == next((place / ".runs/.slurm").rglob(f"{job}.log")).parent.name
    before = {row: (place / f"results/toy/{row}/s0.json").read_bytes() for row in done}

    (place / "params/toy/large.yaml").write_text("dropout: 0.1\n")
    assert sweep(place, cluster, "--profile", "slurm").wait(LONGEST) == 0, said(place)
    assert "12 runs: 9 finished before, 3 to do" in said(place) and len(submitted(place)) == 3
    assert statuses(place) == dict.fromkeys(ROWS, "done")
    assert {row: (place / f"results/toy/{row}/s0.json").read_bytes() for row in done} == before

    whole = folder(tmp_path / "whole", SETTING, ROWS, RUN)
    assert sweep(whole, dict(os.environ), "--methods", "late cancelled", "--jobs", "2").wait(LONGEST) == 0, said(whole)
    for row in ("late", "cancelled"):
        resumed, undisturbed = outcome(place, row), outcome(whole, row)
        assert any(
            note.startswith("resumed at step") for note in records.read(place / f"results/toy/{row}/s0.json").notes
        )
        assert not (found := toy_run.difference(undisturbed, resumed)), (row, found)


def outcome(place: Path, row: str) -> dict:
    """A finished run's adapter, as hashes, and its record's numbers but for times and machines."""
    record = json.loads((place / f"results/toy/{row}/s0.json").read_text())
    made = sorted((place / ".runs/toy" / row / "s0/adapter").glob("*.safetensors"))
    return {
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in made],
        "record": toy_run.timeless(record),
    }


def test_short_runs_share_jobs_one_after_another_and_a_failed_one_stops_no_other(cluster, sweep, tmp_path):
    rows = {f"r{number}": f"rank: {number + 1}" for number in range(12)} | {"r5": "report_to: fail"}
    place = folder(
        tmp_path, "resources: {gpus: 0, cpus: 1, memory: 0.5, hours: 1, together: 4}", rows, light_notebook.BODY
    )
    first = sweep(place, cluster, "--profile", "slurm")
    until(lambda: len(submitted(place)) == 3, first, place)
    asked = ["squeue", "--states=all", "--noheader", "--format=%m %l %C", f"--jobs={','.join(submitted(place))}"]
    told = subprocess.run(asked, env=cluster, capture_output=True, text=True).stdout.split("\n")[:3]
    assert {" ".join(line.split()) for line in told} == {
        "512M 4:00:00 1"
    }  # one run's memory and core, four runs' hours
    assert first.wait(LONGEST) == 1
    assert len(submitted(place)) == 3, said(place)
    assert statuses(place) == dict.fromkeys(rows.keys() - {"r5"}, "done"), said(place)


def test_a_run_on_two_gpus_is_two_processes(cluster, sweep, tmp_path):
    rows = {"lora": "resources: {gpus: 2, cpus: 2}", "head": "# one process"}
    place = folder(tmp_path, SETTING, rows, RUN)
    assert sweep(place, cluster, "--profile", "slurm", "--methods", "lora").wait(LONGEST) == 0, said(place)
    record = records.read(place / "results/toy/lora/s0.json")
    assert record.status == "done" and record.costs.examples == 4 * 4 * 2  # steps, rows a batch, processes
    assert record.environment["threads"] == 1  # of the two cores one each
    log = (place / f".runs/.slurm/rule_fine_tune/toy_lora_0/{record.environment['slurm_job']}.log").read_text()
    assert "gpu=2" in log and "--num_processes 2" in log
    assert (place / ".runs/toy/lora/s0/adapter").is_dir() and not (place / "results/toy/lora/s0.ipynb").exists()
