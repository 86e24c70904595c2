"""A campaign draws cases from a printed seed until its share of the minutes is over, and says how to repeat a failure.

    make faults SEED=7 MINUTES=20       every campaign
    make faults SEED=7 CASE=kills/17    one case of it

A case is a function of a random generator and an empty folder; what it raises is a fault. What a generator draws
depends on (seed, campaign, number) alone. A case killed by the clock, not at an event, need not fail again; one whose
processes race neither. What this machine does not allow is skipped, with the reason. At the end stands a table.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SEED = int(os.environ.get("SEED") or time.time_ns() // 10**6 % 10**8)
MINUTES = float(os.environ.get("MINUTES") or 20)
CASE = os.environ.get("CASE", "")
SHARES = {"kills": 0.24, "params": 0.06, "data": 0.06, "adapters": 0.07, "checkpoints": 0.1, "records": 0.04}
SHARES |= {"processes": 0.11, "places": 0.1, "pipes": 0.06, "fetches": 0.03, "sweeps": 0.07, "archives": 0.02}
SHARES |= {"pickles": 0.04}  # of MINUTES
WRONG = re.compile(r"Traceback \(most recent|Exception ignored|Fatal Python error|terminate called")
NOBODY = 65534
OTHER = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all,+dac_read_search"]
OTHER += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
MOST = 12  # faults after which a campaign ends
LOGS: dict[int, Path] = {}  # of the children that were not yet waited for
RESULTS: dict[str, Result] = {}  # by campaign

# by a thread: a case's own time limit is the alarm signal
marks = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES + 900, method="thread")]


class Hang(BaseException):
    """A case took longer than it may; nothing in the package can mistake it for an error of its own."""


class Fault(AssertionError):
    """What must never happen did."""


@dataclass
class Result:
    """What a campaign came to: how many cases survived by kind, those skipped by reason, and what each fault said."""

    kinds: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str]] = field(default_factory=list)  # how to repeat it; what it was

    @property
    def survived(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        told = [f"{kind} {count}" for kind, count in sorted(self.kinds.items())]
        told += [f"{count} skipped: {reason}" for reason, count in self.skipped.items()]
        return f"{self.survived + len(self.faults)} cases, {len(self.faults)} faults; {', '.join(told)}"


def fault_unless(condition: Any, *told: object) -> None:
    """Raise `Fault` with what is told, unless `condition` holds."""
    if not condition:
        parts = map(str, told)
        raise Fault(" | ".join(part if len(part) < 1500 else f"{part[:400]} … {part[-1100:]}" for part in parts))


def run(name: str, case: Callable[[random.Random, Path], str], folder: Path, seconds: float) -> None:
    """Cases 0, 1, … of campaign `name` for its share of the time, each at most `seconds` long.

    Args:
        case: says in a word what kind of case it was, for the summary.
    """
    only = CASE.partition("/")[2] if CASE.partition("/")[0] == name else None
    if CASE and only is None:
        pytest.skip(f"CASE={CASE}")
    print(f"\n{name}: SEED={SEED}", flush=True)
    ends, result, number = time.monotonic() + 60 * MINUTES * SHARES[name], Result(), int(only or 0)
    RESULTS[name] = result
    while len(result.faults) < MOST:
        place = folder / f"{name}-{number}"
        place.mkdir()
        try:
            with limited(seconds), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result.kinds[case(random.Random(f"{name}/{SEED}/{number}"), place)] += 1
        except pytest.skip.Exception as reason:
            result.skipped[str(reason)] += 1
        except (Exception, Hang) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error}" + ("" if isinstance(error, Fault) else f" at {last}")
            result.faults.append((f"make faults SEED={SEED} CASE={name}/{number}", told))
            print(f"FAULT {told}\n  repeat: {result.faults[-1][0]}", flush=True)
        for pid in [*LOGS]:  # where a fault ended the case, stopped ones too
            os.kill(pid, signal.SIGKILL)
            reaped(pid)
        if only is None:
            shutil.rmtree(place, ignore_errors=True)
        number += 1
        if only is not None or time.monotonic() > ends:
            break
    print(f"{name}: SEED={SEED}: {result}", flush=True)
    if result.faults:
        pytest.fail(f"{len(result.faults)} faults of {name}, SEED={SEED}: see above", pytrace=False)


def table() -> list[str]:
    """Lines of the table over all campaigns; below it each fault, with the command that repeats it."""
    lines = [
        f"{'campaign':12} {'tried':>6} {'survived':>9} {'skipped':>8} {'faults':>7}   SEED={SEED} MINUTES={MINUTES:g}"
    ]
    for name in SHARES:
        if (result := RESULTS.get(name)) is None:
            lines.append(f"{name:12} {'did not run':>16}")
            continue
        numbers = (result.survived + len(result.faults), result.survived, result.skipped.total(), len(result.faults))
        lines.append("{:12} {:6} {:9} {:8} {:7}".format(name, *numbers))
    skipped = sum((result.skipped for result in RESULTS.values()), Counter())
    lines += [f"skipped {count}: {reason}" for reason, count in skipped.items()]
    faults = [fault for result in RESULTS.values() for fault in result.faults]
    return lines + [f"{repeat}\n    {' '.join(told.split())[:300]}" for repeat, told in faults]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block after `seconds`; where nothing can be raised, end all and show where it hangs."""

    def stop(*_: object) -> None:
        raise Hang(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(5 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def command(*argv: object) -> tuple[int, str, str]:
    """`lorakit ARGV` in this process: its exit status, stdout and stderr; what comes out of it is a fault."""
    from lorakit import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([str(word) for word in argv])
        except SystemExit as end:  # argparse's
            status = int(end.code or 0)
    fault_unless(not WRONG.search(err.getvalue()), "a traceback on stderr", err.getvalue())
    if status == 2:
        one_error(err.getvalue().split("error: ")[-1] if "usage:" in err.getvalue() else err.getvalue())
    return status, out.getvalue(), err.getvalue()


def one_error(text: str) -> None:
    """Refusals are one line, short enough to be read, that says something."""
    lines = [line for line in text.splitlines() if line.strip() and "Warning" not in line]
    fault_unless(lines and len(lines) == 1 and 10 < len(lines[0]) < 2000, "not one clear line", text)


def forked(
    work: Callable[[], int], log: Path, environment: dict[str, str] | None = None, output: int | None = None
) -> int:
    """The pid of a child that does `work` and ends with the status it gives; its output is in `log`, or goes elsewhere.

    Args:
        output: file descriptor of the elsewhere.
    """
    if pid := os.fork():
        LOGS[pid] = log
        return pid
    status = 70  # something else came out of it; the traceback is in the log
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno() if output is None else output, 1)
            os.dup2(1, 2)
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):  # pytest's are files of its own
            stream = open(1 if "out" in name else 2, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115
            setattr(sys, name, stream)
        faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
        os.environ.update(environment or {})
        warnings.resetwarnings()
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def program(
    words: Sequence[object],
    log: Path,
    environment: dict[str, str],
    before: Callable[[], object] = lambda: None,
    other: bool = False,
) -> int:
    """The pid of a new Python that runs `lorakit WORDS`.

    Args:
        environment: all of it.
        before: happens first, in the process.
        other: as a user without rights, who may read everything, so that it does not matter where Python is.
    """
    from lorakit.files import PROJECT

    argv = [*(OTHER if other else []), sys.executable, "-m", "lorakit", *map(str, words)]
    setpriv = shutil.which("setpriv")
    if other and (os.geteuid() != 0 or not setpriv):
        pytest.skip("as another user (needs root and setpriv)")

    def work() -> int:
        os.chdir(PROJECT)
        before()
        os.execve(setpriv if other else sys.executable, argv, environment)

    return forked(work, log)


def within(more: int, work: Callable[[], int]) -> Callable[[], int]:
    """`work` in a process that may address `more` bytes beyond what it has when it begins."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("a limit on memory (no /proc)")

    def limited() -> int:
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
        return work()

    return limited


def reaped(pid: int, options: int = 0) -> int | None:
    """The exit status of child `pid`, negative for a signal; with `os.WNOHANG` None while it runs."""
    done, status = os.waitpid(pid, options)
    if not done:
        return None
    del LOGS[pid]
    return os.waitstatus_to_exitcode(status)


def ended(pid: int, seconds: float) -> int:
    """The exit status of child `pid`, negative for a signal; it is killed, and a fault, where it takes longer."""
    ends, log = time.monotonic() + seconds, LOGS[pid]
    while time.monotonic() < ends:
        if (status := reaped(pid, os.WNOHANG)) is not None:
            return status
        time.sleep(0.005)
    os.kill(pid, signal.SIGUSR1)  # where it is goes to its log
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    reaped(pid)
    where = log.read_text(errors="replace").rpartition("most recent call first")[2]
    raise Fault(f"{log.name}: did not end in {seconds:g} s: {where[:1400]}")
