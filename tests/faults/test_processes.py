"""Of two processes one dies, stalls or diverges: both end, in time and with one message, and resuming is bitwise."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from faults import toy_run
from faults.campaign import WRONG, ended, fault_unless, forked, marks, run

pytestmark = marks
LONGEST = 90  # seconds a run of two processes may take
TIMEOUT = 8  # seconds a process waits for the other, as LORAKIT_TIMEOUT says
ROWS = ("lora", "head", "skip", "slora", "random", "sparse", "flora", "pps_fractional", "hira")
HOW = ["dies", "dies", "stopped", "stalls", "diverges", "diverges"]


def two(words: list[str], place: Path, log: str, before: Callable[[int], None] = lambda rank: None) -> list[int]:
    """The pids of two processes that run `lorakit train` together; `before(rank)` is called in each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place_of = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LORAKIT_TIMEOUT": str(TIMEOUT),
    }

    def work(rank: int) -> int:
        before(rank)
        return toy_run.train(words, place)

    return [
        forked(
            lambda rank=rank: work(rank),
            place / f"{log}-{rank}.log",
            place_of | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def at_step(step: int, happens: Callable[[], None]) -> None:
    """`happens` before step `step` of the runs of this process."""
    from lorakit.training import BudgetTrainer

    real, count = BudgetTrainer.training_step, iter(range(1, 10**6))

    def stepping(self, *given):
        if next(count) == step:
            happens()
        return real(self, *given)

    BudgetTrainer.training_step = stepping


def broken_at(step: int) -> None:
    """From step `step` on the loss is NaN in this process."""
    from lorakit.training import BudgetTrainer

    real, count = BudgetTrainer._gated, iter(range(1, 10**6))

    def gated(self, backward, loss, **options):
        if next(count) >= step:
            loss = loss * float("nan")
            if self._part.loss is not None:
                self._part.loss = float("nan")
        return real(self, backward, loss, **options)

    BudgetTrainer._gated = gated


def harm(how: str, step: int) -> None:
    """What happens to the one process."""
    if how == "diverges":
        broken_at(step)
    else:
        number = {"dies": signal.SIGKILL, "stopped": signal.SIGTERM, "stalls": signal.SIGSTOP}[how]
        at_step(step, lambda: os.kill(os.getpid(), number))


def finished(words: list[str], place: Path, log: str) -> None:
    for rank, pid in enumerate(two(words, place, log)):
        status, said = ended(pid, LONGEST), (place / f"{log}-{rank}.log").read_text()
        fault_unless(status == 0 and not WRONG.search(said), f"{log}: process {rank} ended with {status}", said)


def case(rng: random.Random, folder: Path) -> str:
    words = [*toy_run.drawn(rng, ROWS), "-p", "save_steps=1"]
    whole, place = folder / "whole", folder / "harmed"
    whole.mkdir()
    place.mkdir()
    finished(words, whole, "whole")
    wanted, mine, told = toy_run.outcome(whole), toy_run.put_users(place, rng), []
    for number in range(rng.choice([1, 1, 2])):
        how, bad, step = rng.choice(HOW), rng.randrange(2), rng.randint(1, 9)
        began, log = time.monotonic(), f"{number}"
        pids = two(
            words, place, log, lambda rank, how=how, bad=bad, step=step: harm(how, step) if rank == bad else None
        )
        statuses = {1 - bad: ended(pids[1 - bad], LONGEST)}
        took = time.monotonic() - began
        if how == "stalls":
            os.kill(pids[bad], signal.SIGCONT)
        statuses[bad] = ended(pids[bad], LONGEST)
        said = [(place / f"{log}-{rank}.log").read_text() for rank in range(2)]
        told.append(f"process {bad} {how} at step {step} -> {statuses} in {took:.0f} s")
        fault_unless(not any(map(WRONG.search, said)), told, *said)
        if statuses == {0: 0, 1: 0}:  # it was over before
            continue
        allowed = {"dies": (-9, 0), "stopped": (130, -15, 0), "stalls": (1, 0), "diverges": (1,)}[how]
        fault_unless(statuses[bad] in allowed and statuses[1 - bad] in (0, 1), told, *said)
        if statuses[1 - bad] == 1:
            word = "not finite|diverged" if how == "diverges" else "another process"
            lines = [line for line in said[1 - bad].splitlines() if line.startswith(("failed:", "diverged:"))]
            fault_unless(len(lines) == 1 and any(w in lines[0] for w in word.split("|")), told, "no clear line", *said)
        if statuses[0] == 1:
            status = json.loads((place / "record.json").read_text())["status"]
            fault_unless(status == ("diverged" if how == "diverges" else "failed"), told, status)
    finished(words, place, "last")
    difference = toy_run.difference(wanted, toy_run.outcome(place))
    fault_unless(not difference, told, "not as the undisturbed run", difference, words)
    fault_unless(toy_run.users(place) == mine, told, "the user's files changed")
    fault_unless(not toy_run.left_over(place), told, "left over", toy_run.left_over(place))
    return how


def test_one_of_two_processes_is_lost_and_both_end_and_resume_bitwise(tmp_path):
    import lorakit.analysis.tables
    import lorakit.runs.experiment  # noqa: F401

    run("processes", case, tmp_path, 6 * LONGEST)
