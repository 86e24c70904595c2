"""No room, no memory, no leave, no home, nobody who listens: a clear end, and then the run goes on bitwise."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import toy_run
from faults.campaign import NOBODY, WRONG, ended, fault_unless, forked, marks, program, run, within

pytestmark = marks
LONGEST = 90  # seconds a run of a few may take
CACHES = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "LORAKIT_CACHE", "MPLCONFIGDIR", "TRITON_CACHE_DIR")


def clear_end(status: int, said: str, *told: object) -> str:
    """Check how a run that could not go on ended; the line that says why, where it did not succeed."""
    fault_unless(status in (0, 1, 2), *told, f"ended with {status}", said)
    fault_unless(not WRONG.search(said), *told, said)
    starts = ("lorakit ", "failed:", "out_of_memory:", "diverged:")
    lines = [line for line in said.splitlines() if line.startswith(starts)]
    fault_unless(status == 0 or len(lines) == 1, *told, f"{status} without one clear line", said)
    return lines[0] if lines else ""


def goes_on(words: list[str], place: Path, wanted: dict, *told: object) -> None:
    """Once nothing is in its way the same command ends as the undisturbed run, and leaves nothing else."""
    log = place.parent / "last.log"
    status, said = ended(forked(lambda: toy_run.train(words, place), log), LONGEST), log.read_text()
    fault_unless(status == 0 and not WRONG.search(said), *told, f"the last run ended with {status}", said)
    as_wanted(words, place, wanted, *told)


def as_wanted(words: list[str], place: Path, wanted: dict, *told: object) -> None:
    difference = toy_run.difference(wanted, toy_run.outcome(place))
    fault_unless(not difference, *told, "not as the undisturbed run", difference, words)
    fault_unless(not toy_run.left_over(place), *told, "left over", toy_run.left_over(place))


def environment(**changes: str | None) -> dict[str, str]:
    """This process's, as a run of a user's has it; None: without that one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    kept |= {"LORAKIT_PROGRESS": "none", "PYTHONUNBUFFERED": None} | changes
    return {name: value for name, value in kept.items() if value is not None}


# no room --------------------------------------------------------------------------------------------


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `place`, in memory."""
    if os.geteuid() != 0:
        pytest.skip("a file system of its own (not root)")
    place.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a file system of its own ({made.stderr.strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True, capture_output=True)


def disk(rng: random.Random, folder: Path, words: list[str], wanted: dict) -> None:
    """A small disk is full, at whatever moment that is."""
    used = sum(path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file())
    room = int(rng.uniform(0.02, 1.3) * used) // 4096 + 1
    with mounted(folder / "disk", f"size={4 * room}k,mode=755") as place:
        log = folder / "small.log"
        status = ended(forked(lambda: toy_run.train(words, place), log), LONGEST)
        clear_end(status, log.read_text(), f"{4 * room} KiB")
        remount(place, "size=100%")
        goes_on(words, place, wanted, f"{4 * room} KiB")


def file_size(rng: random.Random, folder: Path, words: list[str], wanted: dict) -> None:
    """No file may become larger than that: what a quota, or a shell's `ulimit -f`, does."""
    most, place, log = rng.choice([0, 100, 1000, 4000, 20_000, 60_000, 200_000]), folder / "place", folder / "limit.log"
    place.mkdir()

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        return toy_run.train(words, place)

    # what is printed goes to a file as well, which has the same limit: a pipe has none
    status, said = piped(work, log)
    clear_end(status, said, f"files of at most {most} bytes")
    goes_on(words, place, wanted, f"files of at most {most} bytes")


def piped(work: Callable[[], int], log: Path) -> tuple[int, str]:
    """Status and output of a child that does `work` and prints into a pipe."""
    reading, writing = os.pipe()
    pid = forked(work, log, output=writing)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read().decode(errors="replace")
    return ended(pid, LONGEST), said


# no memory ------------------------------------------------------------------------------------------


def memory(rng: random.Random, folder: Path, words: list[str], wanted: dict) -> None:
    """What can be addressed ends somewhere in the run."""
    more, place, log = int(10 ** rng.uniform(5, 8.8)), folder / "place", folder / "memory.log"
    place.mkdir()
    status = ended(forked(within(more, lambda: toy_run.train(words, place)), log), LONGEST)
    clear_end(status, log.read_text(), f"{more >> 20} MiB more")
    goes_on(words, place, wanted, f"{more >> 20} MiB more")


# no leave -------------------------------------------------------------------------------------------


def read_only(rng: random.Random, folder: Path, words: list[str], wanted: dict) -> None:
    """What the run must write to is another user's: told before it trains, and nothing is written."""
    what, place, log = rng.choice(["run_dir", "record", "above", "both"]), folder / "place", folder / "denied.log"
    mine = place / "mine"
    mine.mkdir(parents=True)
    os.chown(mine, NOBODY, NOBODY) if os.geteuid() == 0 else None
    denied = place / ("deep/run" if what == "above" else "run")
    if what == "run_dir":
        denied.mkdir()
    run_dir, record = mine / "run" if what == "record" else denied, mine / "record.json"
    record = place / "record.json" if what in ("record", "both") else record
    asked = [*words, "-p", f"run_dir={run_dir}", "-p", f"record={record}"]
    status = ended(program(asked, log, environment(), other=True), LONGEST)
    said = clear_end(status, log.read_text(), what)
    names = {"record": ["record="], "both": ["run_dir=", "record="]}.get(what, ["run_dir="])
    told = any(name in said for name in names) and "cannot be written" in said
    fault_unless(status == 2 and told, what, status, log.read_text())
    fault_unless(not [*mine.iterdir()], what, "something was written before it was refused")


def frozen(rng: random.Random, folder: Path, words: list[str], wanted: dict) -> None:
    """The file system of what it must write to is read only, at once or from a checkpoint on; root is refused, too."""
    with mounted(folder / "disk", "mode=755") as place:
        step, log = rng.choice([0, 1, 2, 4]), folder / "frozen.log"
        if not step:
            remount(place, "ro")

        def work() -> int:
            from lorakit.training import checkpoint

            real, count = checkpoint.save_run, iter(range(1, 10**6))

            def saving(*given: object) -> None:
                if next(count) == step:
                    subprocess.run(["mount", "-o", "remount,ro,force", place], capture_output=True)
                real(*given)

            checkpoint.save_run = saving
            return toy_run.train(words, place)

        status = ended(forked(work, log), LONGEST)
        clear_end(status, log.read_text(), f"read only from checkpoint {step} on")
        fault_unless(step or status == 2, "was not refused", status, log.read_text())
        remount(place, "rw")
        goes_on(words, place, wanted, f"read only from checkpoint {step} on")


def home(rng: random.Random, folder: Path, words: list[str], wanted: dict) -> None:
    """Without a home, or with one and caches that cannot be written to, a run with local files is as ever."""
    other = rng.random() < 0.7
    place, denied, log = folder / "place", folder / "denied", folder / "home.log"
    place.mkdir()
    denied.mkdir(mode=0o555)
    if os.geteuid() == 0 and other:
        os.chown(place, NOBODY, NOBODY)
    value = rng.choice([None, "", "/nonexistent", "/dev/null", str(denied), str(denied / "deeper")])
    names = rng.choice([("HOME",), CACHES, CACHES])
    changes = dict.fromkeys(CACHES) | dict.fromkeys(names, value)
    if rng.random() < 0.3:
        changes |= dict.fromkeys(("PATH", "LANG", "USER", "LOGNAME"))
    given = {"run_dir": place / "run", "record": place / "record.json"}
    more = [word for name, path in given.items() for word in ("-p", f"{name}={path}")]
    status = ended(program([*words, *more], log, environment(**changes), other=other), LONGEST)
    told = f"{' '.join(names)}={value!r}, {'another user' if other else 'the same user'}"
    fault_unless(status == 0 and not WRONG.search(log.read_text()), told, status, log.read_text())
    as_wanted(words, place, wanted, told)


PLACES = {
    "disk": disk,
    "file size": file_size,
    "memory": memory,
    "read only": read_only,
    "frozen": frozen,
    "home": home,
}


def places_case(rng: random.Random, folder: Path) -> str:
    words, kind = toy_run.drawn(rng), rng.choice(sorted(PLACES))
    PLACES[kind](rng, folder, words, toy_run.whole(words, folder / "whole", LONGEST))
    return kind


# nobody listens -------------------------------------------------------------------------------------

SAY = [
    *(["--help"], ["--version"], ["params"], ["train", "--help"], ["fetch"], ["fetch", "--list"], ["no-such-command"]),
    *(["train", "-p", "rank=x"], ["init"], ["table", "results/toy"], ["report", "results/toy"], ["scratch", "--help"]),
    *(["claims", "--setting", "toy"], ["plan", "toy-encoder", "--gpu", "24"], ["predict", "toy-encoder"]),
    *(["search"], ["train"], ["train"]),
]
OUT = ["head", "head", "nobody", "closed", "/dev/full"]


def pipes_case(rng: random.Random, folder: Path) -> str:
    words, out, err = [*rng.choice(SAY)], rng.choice(OUT), rng.choice(["kept", "kept", "as stdout", "closed"])
    training = words == ["train"]
    given = {"run_dir": folder / "run", "record": folder / "record.json"}
    if training:
        drawn = toy_run.drawn(rng)
        words = [*drawn, *(word for name, path in given.items() for word in ("-p", f"{name}={path}"))]
    elif words == ["init"]:
        words = ["init", folder / "made"]
    elif words == ["search"]:
        small = toy_run.SMALL | {"search_rates": "[1e-3, 2e-3]", "search_budget": 2, "record": folder / "search.json"}
        words = ["search", *(word for name, value in small.items() for word in ("-p", f"{name}={value}"))]
    reading, writing = os.pipe()

    def before() -> None:
        if out == "closed":
            os.close(1)
        else:
            os.dup2(os.open(out, os.O_WRONLY) if out == "/dev/full" else writing, 1)
        if err == "closed":
            os.close(2)
        elif err == "as stdout" and out != "closed":
            os.dup2(1, 2)

    shown = environment(LORAKIT_PROGRESS=rng.choice(["plain", "none", None]), HF_HOME=str(folder / "hub"))
    pid, log = program(words, folder / "log", shown, before), folder / "log"
    os.close(writing)
    with open(reading, "rb") as file:
        heard = file.readline() if out == "head" else b""
    status, said = ended(pid, LONGEST), heard.decode() + log.read_text(errors="replace")
    told = f"{words[:4]}, stdout {out}, stderr {err}"
    fault_unless(status in (0, 1, 2) and not WRONG.search(said), told, f"ended with {status}", said)
    if training:
        wanted = toy_run.whole(drawn, folder / "whole", LONGEST)
        fault_unless(out != "closed" or status == 0, told, f"ended with {status}", said)
        goes_on(drawn, folder, wanted, told)
    elif words[0] == "init" and status == 0:
        fault_unless((folder / "made" / "params" / "toy" / "lora.yaml").is_file(), told, "said nothing, made nothing")
    return f"{words[0]} {out}"


def test_a_run_without_room_memory_leave_or_home_ends_clearly_and_goes_on(tmp_path):
    import lorakit.analysis.tables
    import lorakit.runs.experiment  # noqa: F401

    run("places", places_case, tmp_path, 4 * LONGEST)


def test_a_command_to_which_nobody_listens_ends_without_a_traceback(tmp_path):
    import lorakit.analysis.tables
    import lorakit.runs.experiment  # noqa: F401

    run("pipes", pipes_case, tmp_path, 4 * LONGEST)
