"""A run that is killed at any file event or moment, again and again, ends as one that nobody disturbed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from faults import toy_run
from faults.campaign import WRONG, ended, fault_unless, forked, marks, run
from faults.events import AT, Events

pytestmark = marks
LONGEST = 60  # seconds a run of one may take
HOW = ["kill", "kill", "term", "power", "full"]


def attempt(words: list[str], place: Path, log: Path, stop: int, how: str, **more: object) -> int:
    """A run that is stopped at file event `stop`, 0 for none; the number of events is beside the log."""

    def work() -> int:
        events = Events(place, stop, AT[how])
        status = toy_run.train(words, place, **more)
        log.with_suffix(".count").write_text(str(events.count))
        return status

    return forked(work, log)


def consistent(place: Path, wanted: dict) -> None:
    """What is there after a kill under its own name is whole."""
    from lorakit import records
    from lorakit.training import checkpoint

    files = [checkpoint.RUN, checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.BEST, *checkpoint.TRAINERS]
    for path in checkpoint.ours(place / "run"):
        problem = checkpoint.damage(path, [*files, "rng_state.pth"])
        fault_unless(not problem, f"{path.name} stands under its name and is not whole: {problem}")
    if (place / "record.json").exists():
        records.read(place / "record.json")
    found = toy_run.hashes(place)
    if any(name in found for name in ("run/adapter/adapter_config.json", "run/adapter/lorakit_config.json")):
        torn = [name for name, sha in wanted["files"].items() if "run/adapter/" in name and found.get(name, sha) != sha]
        missing = [name for name in wanted["files"] if name.endswith("safetensors") and name not in found]
        missing = [name for name in missing if "run/adapter/" in name]  # who finds its config finds its weights
        fault_unless(not torn + missing, "an adapter that is not whole", torn, missing)


def case(rng: random.Random, folder: Path) -> str:
    words = toy_run.drawn(rng)
    began = time.monotonic()
    wanted = toy_run.whole(words, folder / "whole", LONGEST)
    seconds = time.monotonic() - began
    place = folder / "killed"
    place.mkdir()
    mine, kinds, events, told = toy_run.put_users(place, rng), [], 90, []
    for number in range(rng.choice([1, 1, 2, 2, 3, 5])):
        how, log = rng.choice(HOW), place / f"{number}.log"
        more = {"resume": "false"} if rng.random() < 0.2 else {}
        by_clock = rng.random() < 0.25 and how in ("kill", "term")
        stop = 0 if by_clock else rng.randint(1, events)
        pid = attempt(words, place, log, stop, how, **more)
        if by_clock:
            time.sleep(rng.uniform(0, 1.2 * seconds))
            os.kill(pid, {"kill": signal.SIGKILL, "term": signal.SIGTERM}[how])  # not yet waited for, so it is there
        status = ended(pid, LONGEST)
        said = log.read_text() if log.exists() else ""
        told.append(f"{how} at {'the clock' if by_clock else stop} {more or ''} -> {status}")
        allowed = {"kill": (-9, 0), "power": (-9, 0), "term": (130, -15, 0), "full": (0, 1, 2)}[how]
        fault_unless(status in allowed, told, said)
        fault_unless(not WRONG.search(said), told, said)
        if log.with_suffix(".count").exists():
            events = max(10, int(log.with_suffix(".count").read_text()))
        consistent(place, wanted)
        kinds.append(how)
    log = place / "last.log"
    status = ended(attempt(words, place, log, 0, "kill"), LONGEST)
    fault_unless(
        status == 0 and not WRONG.search(log.read_text()), told, f"the last run ended with {status}", log.read_text()
    )
    difference = toy_run.difference(wanted, toy_run.outcome(place))
    fault_unless(not difference, told, "not as the undisturbed run", difference, words)
    found = toy_run.users(place)
    fault_unless(found == mine, told, "the user's files changed", sorted(mine.items() ^ found.items()))
    fault_unless(not toy_run.left_over(place), told, "left over", toy_run.left_over(place))
    return f"{len(kinds)} stops"


def test_a_killed_run_resumes_bitwise_and_touches_nothing_of_the_users(tmp_path):
    import lorakit.analysis.tables  # imported once: children are forks
    import lorakit.runs.experiment  # noqa: F401

    run("kills", case, tmp_path, 10 * LONGEST)
