"""A SLURM of one node on loopback, as root, from Debian's `slurm-wlm` and `munge`: everything it writes is in a folder.

    python tests/slurm/loopback.py FOLDER    # until Ctrl-C; elsewhere: export SLURM_CONF=FOLDER/slurm.conf

Memory is enforced by `jobacct_gather/linux`, which looks every second, and `OverMemoryKill`; there is no accounting
database. The two GPUs are names only, as the scheduler counts them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")
GPUS = 2
SECONDS = 30  # the longest that a daemon may take to answer
CONFIG = """
ClusterName=loopback
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
OverTimeLimit=0
KillWait=30
MinJobAge=300
SchedulerParameters=sched_interval=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.pid
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
NodeName=localhost CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no SLURM can be started here; empty where it can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"not installed: {', '.join(absent)} (apt install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "its daemons start jobs as their users: needs root"


class NotStarted(RuntimeError):
    """A daemon ended or did not answer; with the last lines of the logs."""


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 2, memory: int = 8000) -> Iterator[dict[str, str]]:
    """Start it, give the environment in which `sbatch` and the others find it, stop it with all of its jobs.

    Args:
        folder: for its configuration, state and logs.
        memory: of the node, in MiB.

    Raises:
        NotStarted: with the logs.
    """
    _configure(folder, cpus, memory)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{_path()}"}
    daemons: list[subprocess.Popen] = []
    places = {"key-file": "munge.key", "socket": "munge.socket", "log-file": "munged.log"}
    places |= {"pid-file": "munged.pid", "seed-file": "munged.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in places.items())]
    try:
        for command, ready in (
            (munged, ["munge", "-n", f"--socket={folder}/munge.socket"]),
            (["slurmctld", "-D"], ["scontrol", "ping"]),
            (["slurmd", "-D", "-N", "localhost"], ["sh", "-c", "sinfo --noheader --format=%T | grep -qx idle"]),
        ):
            with (folder / f"{command[0]}.out").open("w") as said:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
                )
            _wait(folder, command[0], daemons[-1], ready, environment)
        yield environment
    finally:
        if len(daemons) == 3:
            _end_jobs(environment)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
        _end_left(folder)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where daemons are


def _configure(folder: Path, cpus: int, memory: int) -> None:
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("", 0))
        ports = {"controller": first.getsockname()[1], "node": second.getsockname()[1]}
    srun = folder / "bin" / "srun"  # Snakemake starts it without SLURM's variables; a cluster has its file in /etc
    srun.write_text(f'#!/bin/sh\nSLURM_CONF="{folder}/slurm.conf" exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, gpus=GPUS, cpus=cpus, memory=memory, **ports))
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")


def _wait(folder: Path, name: str, daemon: subprocess.Popen, ready: list[str], environment: dict[str, str]) -> None:
    deadline = time.monotonic() + SECONDS
    while subprocess.run(ready, env=environment, capture_output=True).returncode:
        if daemon.poll() is not None or time.monotonic() > deadline:
            logs = [path for path in sorted(folder.glob("*.*")) if path.suffix in (".log", ".out")]
            told = "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in logs)
            raise NotStarted(f"{name} did not start: status {daemon.poll()}\n{told}")
        time.sleep(0.2)


def _end_jobs(environment: dict[str, str]) -> None:
    subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
    deadline = time.monotonic() + SECONDS
    there = ["squeue", "--noheader"]
    while subprocess.run(there, env=environment, capture_output=True).stdout and time.monotonic() < deadline:
        time.sleep(0.2)
    subprocess.run(["scancel", "--signal=KILL", "--user=root"], env=environment, capture_output=True)


def _end_left(folder: Path) -> None:
    """End what a killed job left: `proctrack/linuxproc` loses sight of processes whose parent has ended."""
    ours = {f"SLURM_CONF={folder}/slurm.conf".encode(), b"SLURM_JOB_ID="}
    for process in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            variables = (process / "environ").read_bytes().split(b"\0")
            if all(any(variable.startswith(start) for variable in variables) for start in ours):
                os.kill(int(process.name), signal.SIGKILL)


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]).resolve()), contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={Path(sys.argv[1]).resolve()}/slurm.conf", flush=True)
        signal.pause()
