"""Small wrong changes to the package, one at a time: does a test fail? (`make mutants SEED=7 N=60`)

Mutants follow from rules over the syntax tree, and a seed draws among them, in proportion to files' lines. Each is put
into a copy of the tree and met by the tests that run its line, the quickest of the nearest first. Which test runs which
line is traced once per test file and kept, as results are, under .runs/: a campaign called again goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest
from mutant_rules import ROOMS, ROOT, draw, mutated

LIMIT, BUDGET = 120, 60  # seconds a mutant may take; seconds its tests took when they were traced
PYTEST = ("-q", "-p", "no:cacheprovider", "-p", "no:nbval", "-p", "no:xdist")
HEAVY = ("torch", "transformers", "transformers.trainer", "peft", "accelerate", "datasets", "scipy.stats", "pandas")
TRACES: dict[str, dict] = {}  # test -> what it ran so far


# --- which test runs which line: this file is a pytest plugin too, `-p mutants` ---------------------------------------
@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Trace the package's lines in this test; after a file's last, write what its passing tests ran."""
    found = TRACES.setdefault(item.nodeid, {"seconds": 0.0, "failed": False, "lines": set()})
    found["words"] = sorted(set(re.findall(r"\w+", inspect.getsource(item.function))))
    package = f"{ROOT}/lorakit/"

    def local(frame, event, _):
        if event == "line":
            found["lines"].add((frame.f_code.co_filename, frame.f_lineno))
        return local

    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename.startswith(package) else None)
    result = yield
    sys.settrace(None)
    if nextitem is None or nextitem.path != item.path:
        for trace in TRACES.values():
            trace["lines"] = sorted({f"{Path(name).relative_to(ROOT).as_posix()}:{text_of(name)[line - 1].strip()}"
                                     for name, line in trace["lines"]})  # fmt: skip
        kept = {test: trace for test, trace in TRACES.items() if not trace["failed"]}
        kept_in(Path(os.environ["TRACES"]), item.path).write_text(json.dumps(kept))
        TRACES.clear()
    return result


def pytest_runtest_logreport(report) -> None:
    found = TRACES[report.nodeid]
    found["seconds"] += report.duration
    found["failed"] |= report.outcome != "passed"


@cache
def text_of(name: str) -> list[str]:
    return Path(name).read_text().splitlines()


def kept_in(store: Path, path: Path) -> Path:
    """Where a test file's traces lie, by its content."""
    return store / f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}.json"


# --- a campaign ------------------------------------------------------------------------------------------------------
def copied(folder: Path) -> Path:
    """The tree as it is on disk, without what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def tested(tree: Path, *arguments: str, seconds: float) -> tuple[int | None, str]:
    """Exit code (none where time was up) and output of pytest in the copy: a fork, which has PyTorch loaded already."""
    output = tree.parent / "output"
    if not (child := os.fork()):
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC * (stream == 1) | os.O_APPEND), stream)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os._exit(pytest.main([*PYTEST, f"--basetemp={tree.parent / 'tmp'}", *arguments]))
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status, output.read_text()
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, ""


def traced(tree: Path) -> dict[str, dict]:
    """Each test's seconds and the lines it runs; a test file is traced once, and again when it changed."""
    store, found = ROOT / ".runs" / "mutants-traces", {}
    store.mkdir(parents=True, exist_ok=True)
    named = re.compile(rf"lorakit(\.| import .*)\b({'|'.join(ROOMS)})\b")
    files = [path for path in sorted((tree / "tests").rglob("test_*.py")) if named.search(path.read_text())]
    files.sort(key=lambda path: path.parent.name not in ROOMS)
    if new := [str(path) for path in files if not kept_in(store, path).exists()]:
        print(f"tracing {len(new)} test files", flush=True)
        paths = os.pathsep.join((str(tree), str(tree / "scripts")))
        environment = os.environ | {"PYTHONPATH": paths, "TRACES": str(store)}
        command = [sys.executable, "-m", "pytest", *PYTEST, f"--basetemp={tree.parent / 'tmp'}", "-p", "mutants", *new]
        subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for path in files:
        found |= json.loads(kept_in(store, path).read_text()) if kept_in(store, path).exists() else {}
    return found


def tests_of(mutant: dict, traces: dict[str, dict]) -> list[str]:
    """Tests that run the line, then others of those files, then any of the file or its names; within BUDGET seconds."""
    path, shows, names = mutant["path"], re.compile(mutant["shows"]), set(mutant["names"])
    runs = {test for test, trace in traces.items() if any(map(shows.search, trace["lines"]))}
    files = {test.split("::")[0] for test in runs}
    enters = {test for test, trace in traces.items() if any(line.startswith(f"{path}:") for line in trace["lines"])}
    cases = {test for test in traces if names & set(re.findall(r"\w+", test.partition("[")[2]))}  # a row of a table

    def rank(test: str) -> tuple:
        near = names & set(traces[test]["words"]) or test.split("/")[1] == path.split("/")[1]
        return test not in cases, test not in runs, test.split("::")[0] not in files, not near, traces[test]["seconds"]

    chosen, seconds = [], 0.0
    for test in sorted(runs | enters | cases, key=rank):
        if seconds + traces[test]["seconds"] <= BUDGET:
            chosen, seconds = [*chosen, test], seconds + traces[test]["seconds"]
    return chosen


def meet(mutant: dict, tree: Path, tests: list[str]) -> dict:
    """What the tests say of a mutant, and the first that fails."""
    path, arguments, started = tree / mutant["path"], tree.parent / "arguments", time.monotonic()
    arguments.write_text("\n".join(tests))
    sound, code, output = path.read_text(), 0, ""
    if changed := mutated(mutant, sound) if tests else "":
        path.write_text(changed)
        code, output = tested(tree, "-x", f"@{arguments}", seconds=LIMIT)
        if "\nERROR: not found: " in output:  # the change gave a test's cases other names
            arguments.write_text("\n".join(dict.fromkeys(test.split("[")[0] for test in tests)))
            code, output = tested(tree, "-x", f"@{arguments}", seconds=LIMIT)
        path.write_text(sound)
    seconds = round(time.monotonic() - started)
    by = re.findall(r"^(?:FAILED|ERROR) (?:\S*::)?(\S+)", output, re.MULTILINE)
    if code is None:  # it hangs, unless the tests are as slow without it
        code, by = tested(tree, "-x", f"@{arguments}", seconds=LIMIT)[0] == 0, ["time"]
    status = "caught" if code else "survived" if changed or not tests else "gone"
    return {"status": status, "seconds": seconds, "by": (by or [""])[0] if code else "", "tests": len(tests)}


def prepare(tree: Path) -> None:
    """What every run of pytest forked from here finds: the copy before this tree, tests' settings, PyTorch loaded."""
    os.environ |= {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.dont_write_bytecode = True
    for name in HEAVY:
        importlib.import_module(name)


def shown(mutant: dict) -> tuple[str, str]:
    """A row of the table, and the difference."""
    place = f"{mutant['path']}:{mutant['line']}"
    old, new = " ".join(line.strip() for line in mutant["old"]), mutant["new"].strip()
    start = max(0, len(os.path.commonprefix([old, new])) - 12)
    end = len(os.path.commonprefix([old[start:][::-1], new[start:][::-1]]))
    change = f"{old[start : len(old) - end]} -> {new[start : len(new) - end]}"
    difference = "\n".join([place, *(f"-{line}" for line in mutant["old"]), f"+{mutant['new']}", ""])
    row = f"{mutant['status']:8} {mutant['seconds']:4} s {mutant['tests']:4} tests  {place:45} {change[:90]}"
    return f"{row}  [{mutant['by'][:50]}]", difference


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=lambda text: int(text or random.SystemRandom().randrange(10**6)), default="")
    options.add_argument("--count", type=int, default=60)
    options.add_argument("--under", default="", help="only of files with this in their path, such as tokens/")
    options.add_argument("--again", action="store_true", help="meet the survivors again, after new tests")
    asked = options.parse_args()
    store = ROOT / ".runs" / f"mutants-{asked.seed}{asked.under.replace('/', '-')}.json"
    mutants = json.loads(store.read_text()) if store.exists() else draw(asked.seed, asked.count, asked.under)
    print(f"seed {asked.seed}, {len(mutants)} mutants, kept in {store.relative_to(ROOT)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder) / "tree")
        traces = traced(tree)
        prepare(tree)
        for number, mutant in enumerate(mutants, 1):
            if "status" not in mutant or (asked.again and mutant["status"] == "survived"):
                mutant |= meet(mutant, tree, tests_of(mutant, traces))
                store.write_text(json.dumps(mutants, indent=1))
            print(f"{number:3} {shown(mutant)[0]}", flush=True)
    survivors = [mutant for mutant in mutants if mutant["status"] == "survived"]
    print("", *(shown(mutant)[1] for mutant in survivors), sep="\n")
    caught = sum(mutant["status"] == "caught" for mutant in mutants)
    met = max(1, caught + len(survivors))  # the others' lines are gone
    print(f"seed {asked.seed}: {caught} of {met} caught ({caught / met:.2f})")


if __name__ == "__main__":
    main()
