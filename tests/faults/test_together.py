"""Several fetches and several sweeps at once, some of them killed: nobody meets another, and what is left is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import light_notebook
from fake_assets import ARCHIVES, DEMO, SECOND, FakeClient
from faults.campaign import LOGS, WRONG, ended, fault_unless, forked, marks, reaped, run
from faults.events import AT, Events
from filelock import FileLock

from lorakit import assets, cli, records
from lorakit.assets import client
from lorakit.assets.registry import ASSETS, Asset

pytestmark = marks
LONGEST = 60  # seconds

# fetches --------------------------------------------------------------------------------------------

PINS = {member.name: member.sha256 for member in DEMO.members}
EVENTS = 60  # of files in a fetch's folder, about
WHAT = ["fetch", "fetch", "fetch", "fetch both", "look", "fails", "damaged", "kill", "kill", "term", "full"]


class Slow(FakeClient):
    """As slow as a network is, in pieces; each of its downloads is a line of `calls`."""

    def __init__(self, calls: Path, rng: random.Random, **how: object):
        super().__init__(dict(ARCHIVES), **how)
        self.noted, self.waits = calls, [rng.uniform(0, 0.1) for _ in range(4)]

    def __call__(self, command, folder, tick):
        with self.noted.open("a") as file:
            file.write("x")
        for wait in self.waits:
            time.sleep(wait)
            tick()
        return super().__call__(command, folder, tick)


def fetches(what: str, seed: int, cache: Path) -> int:
    """What one of the processes does, in a child; its exit status."""
    rng = random.Random(seed)
    ASSETS.update(demo=DEMO, second=Asset("second", "data", DEMO.packages[1:], terms="", notice="text.txt"))
    fails = {"status": 1, "output": "ERROR: no network"} if what == "fails" else {}
    client.run_client = Slow(cache.parent / "calls", rng, **fails)
    if what == "damaged":
        client.run_client.archives["two-1.tar.gz"] = SECOND[: rng.randrange(len(SECOND))]
    time.sleep(rng.uniform(0, 0.3))
    if what in AT:
        Events(cache, rng.randint(1, EVENTS), AT[what])
    if what == "look":
        for _ in range(rng.randint(1, 200)):
            folder = assets.path("demo")
            fault_unless(not folder or (folder / "text.txt").is_file() or assets.path("demo") is None, "half there")
            time.sleep(0.005)
        return 0
    return cli.main(["fetch", "demo", *["second"] * (what == "fetch both")])


def whole(folder: Path, names: dict[str, str]) -> bool:
    """Is every file there with its pinned bytes?"""
    found = {name: folder / name for name in names}
    return all(p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == names[n] for n, p in found.items())


def fetches_case(rng: random.Random, folder: Path) -> str:
    cache, before = folder / "cache", rng.choice(["empty", "empty", "whole", "damaged", "left"])
    shown = {"LORAKIT_CACHE": str(cache), "CI": "1"}
    if before != "empty":
        ended(forked(lambda: fetches("fetch both", 0, cache), folder / "before.log", shown), LONGEST)
    if before == "damaged":
        rng.choice([cache / "demo" / "text.txt", cache / "demo" / "manifest.json"]).write_bytes(b"other bytes")
    elif before == "left":
        ended(forked(lambda: fetches("kill", rng.randrange(99), cache), folder / "left.log", shown), LONGEST)
    (folder / "calls").write_text("")
    chosen = [rng.choice(WHAT) for _ in range(rng.randint(2, 6))]
    started = [(what, rng.randrange(10**6), folder / f"{n}.log") for n, what in enumerate(chosen)]
    pids = [forked(partial(fetches, what, seed, cache), log, shown) for what, seed, log in started]
    for pid, (what, _, log) in zip(pids, started, strict=True):
        status, said = ended(pid, LONGEST), log.read_text()
        allowed = {"fails": (0, 2), "damaged": (0, 2), "full": (0, 1, 2), "kill": (-9, 0), "term": (130, -15, 0)}
        fault_unless(status in allowed.get(what, (0,)), chosen, f"{what} ended with {status}", said)
        fault_unless(not WRONG.search(said), chosen, said)
        lines = [line for line in said.splitlines() if line.startswith("lorakit fetch: ")]
        fault_unless(status not in (1, 2) or len(lines) == 1, chosen, f"{what}: no one clear line", said)
        fault_unless(status or what == "look" or whole(cache / "demo", PINS), chosen, f"{what}: not whole, and told so")
    calls = (folder / "calls").read_text()
    undisturbed = before == "empty" and set(chosen) <= {"fetch", "look"} and "fetch" in chosen
    fault_unless(not undisturbed or len(calls) == 2, chosen, f"{len(calls)} downloads of two packages")
    log = folder / "last.log"
    status = ended(forked(lambda: fetches("fetch both", 1, cache), log, shown), LONGEST)
    fault_unless(
        status == 0 and whole(cache / "demo", PINS), chosen, f"the last one ended with {status}", log.read_text()
    )
    found = sorted(path.name for path in cache.iterdir())
    fault_unless(found == [".locks", "demo", "second"], chosen, "left in the cache", found)
    return f"{before}, {len(chosen)} at once"


# sweeps ---------------------------------------------------------------------------------------------

SWEEP = """\
import sys
from lorakit import cli
from lorakit.runs import sweep

real = sweep.plan
sweep.plan = lambda _, *asked: real(sys.argv[1], *asked)
sys.exit(cli.main(["sweep", "--setting", sys.argv[2], "--jobs", "2"]))
"""
ALONE = """\
import os
from pathlib import Path

mark = Path(record).with_suffix(".at-work")
mark.parent.mkdir(parents=True, exist_ok=True)
if mark.exists() and (pid := mark.read_text()) and Path(f"/proc/{pid}").exists():
    mark.with_suffix(".collision").touch()
mark.write_text(str(os.getpid()))
"""
ROWS = ("lora", "head")


def sweeping(place: Path, setting: str) -> int:
    """In a child: a sweep in a process group of its own."""
    os.setsid()
    os.execv(sys.executable, [sys.executable, "-c", SWEEP, str(place), setting])


def prepared(place: Path, settings: list[str]) -> None:
    """A project whose notebook notes who else is at the same run."""
    light_notebook.write(place / "notebooks" / "01_lora.ipynb", body=ALONE + light_notebook.BODY)
    for setting in settings:
        folder = place / "params" / setting
        folder.mkdir(parents=True)
        for name in ("_setting", *ROWS):
            (folder / f"{name}.yaml").write_text("rank: 4\n" if name == "_setting" else "# defaults\n")


def released(place: Path, setting: str) -> None:
    """Wait until all of a sweep's processes have ended, which hold its lock."""
    lock = place / ".runs" / f".{setting}.lock"
    if lock.parent.is_dir():
        with FileLock(lock, timeout=2 * LONGEST):
            pass


def sweeps_case(rng: random.Random, folder: Path) -> str:
    settings = ["toy", "other"][: rng.choice([1, 1, 2])]
    place, told, started = folder / "place", [], []
    prepared(place, settings)
    for number in range(rng.choice([2, 2, 3])):
        setting, log = rng.choice(settings), folder / f"{number}.log"
        started.append((setting, log, forked(partial(sweeping, place, setting), log)))
        time.sleep(rng.choice([0, 0, rng.uniform(0, 6)]))
    harmed = rng.choice([None, "alone", "all", "asked"])
    chosen = rng.choice(started)[2]
    if harmed:
        time.sleep(rng.uniform(0, 10))
        if reaped_now(chosen) is None:
            number = signal.SIGINT if harmed == "asked" else signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                (os.kill if harmed == "alone" else os.killpg)(chosen, number)
    for setting, log, pid in started:
        status, said = DONE.pop(pid) if pid in DONE else ended(pid, 3 * LONGEST), log.read_text()
        told.append(f"{setting} {'harmed: ' + harmed if harmed and pid == chosen else ''} -> {status}")
        refused = "another sweep of it is at work there" in said
        allowed = (0, 1, 2, 130, -2, -9) if harmed and pid == chosen else (0, 2) if not harmed else (0, 1, 2)
        fault_unless(status in allowed and (status == 2) <= refused, told, said)
        fault_unless(harmed and pid == chosen or not WRONG.search(said), told, said)
    for setting in settings:
        released(place, setting)
        log = folder / f"last-{setting}.log"
        status = ended(forked(partial(sweeping, place, setting), log), 3 * LONGEST)
        fault_unless(status == 0, told, f"the last sweep of {setting} ended with {status}", log.read_text())
        made = [place / "results" / setting / row / "s0.json" for row in ROWS]
        fault_unless(all(records.read(path).status == "done" for path in made), told, "not done", made)
    collisions = sorted(path.name for path in place.rglob("*.collision"))
    fault_unless(not collisions, told, "two at work on the same run", collisions)
    return f"{len(started)} at once, {harmed or 'none'} harmed"


DONE: dict[int, int] = {}  # status of a sweep that had ended before it could be harmed


def reaped_now(pid: int) -> int | None:
    if pid in LOGS and (status := reaped(pid, os.WNOHANG)) is not None:
        DONE[pid] = status
    return DONE.get(pid)


def test_several_fetches_at_once_leave_the_cache_whole(tmp_path):
    run("fetches", fetches_case, tmp_path, 4 * LONGEST)


def test_several_sweeps_at_once_run_nothing_twice_and_go_on(tmp_path):
    run("sweeps", sweeps_case, tmp_path, 12 * LONGEST)
