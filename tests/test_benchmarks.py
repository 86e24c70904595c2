"""The benchmarks' interface: listing, table, last line, exit codes; measuring itself on claims made up here."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

import benchmarks.__main__ as cli
from benchmarks._common import Claim, Timing, interleave, last_line, table, time_claim, worst
from lorakit.errors import ParameterError

LAST_LINE = r"^\w+: (\d+\.\d+|nan|inf) \(target \d+\.\d+\) (ok|missed)$"


@pytest.fixture
def made_up(monkeypatch):
    """Replace the benchmarks there are by ones with given claims."""

    def put(**claims):
        modules = {
            name: SimpleNamespace(DESCRIPTION=f"about {name}", TARGET=f"as {name} says", run=lambda it=it: it)
            for name, it in claims.items()
        }
        monkeypatch.setattr(cli, "names", lambda: sorted(modules))
        monkeypatch.setattr(cli, "load", modules.__getitem__)

    return put


KEPT, MISSED = Claim("kept", 90.0, 100.0, 1.0, "ms"), Claim("missed", 103.0, 100.0, 1.02, "MiB")


def test_listing_names_every_benchmark_with_its_target(made_up, capsys):
    made_up(one=[KEPT], two=[MISSED])
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "one        about one\n" in out and "target: as two says" in out


@pytest.mark.parametrize(
    ("claims", "status", "last"),
    [([KEPT], 0, "0.9000 (target 1.0000) ok"), ([KEPT, MISSED], 1, "1.0300 (target 1.0200) missed"),
     ([MISSED, KEPT], 1, "1.0300 (target 1.0200) missed")],
)  # fmt: skip
def test_the_worst_claim_decides(made_up, capsys, claims, status, last):
    made_up(two=claims)
    assert cli.main(["two"]) == status
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"two: {last}" and re.match(LAST_LINE, f"two: {last}")
    assert all(re.search(rf"^{claim.name} .*{claim.verdict}$", out, re.M) for claim in claims)


def test_an_unknown_name(made_up, capsys):
    made_up(one=[KEPT])
    assert cli.main(["three"]) == 2
    assert "'three': unknown; known are one" in capsys.readouterr().err


def test_what_was_measured_is_saved_whole(made_up, tmp_path, capsys):
    made_up(two=[KEPT, MISSED, Claim("to know", float("nan"), 2.0, unit="s", measured_ratio=0.5)])
    for _ in range(2):  # an earlier file is replaced
        assert cli.main(["two", "--save", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("two: ")
    (path,) = (tmp_path / "new").iterdir()
    text = path.read_text()
    told = json.loads(text)
    assert text == json.dumps(told, indent=1, sort_keys=True) + "\n" and path.name == "two.json"
    kept, missed, known = told["claims"]
    assert kept == {"name": "kept", "ours": 90, "theirs": 100, "unit": "ms", "ratio": 0.9, "target": 1, "ok": True}
    assert missed["ok"] is False and (known["ours"], known["target"], known["ratio"]) == (None, None, 0.5)
    assert {*told} == {"benchmark", "claims", "cpu", "cpus", "date", "threads", "versions"}
    assert {*told["versions"]} == {"torch", "transformers", "peft"}


def test_several_run_each_in_a_process_of_its_own(made_up, monkeypatch):
    calls = []
    monkeypatch.setattr("subprocess.call", lambda command: calls.append(command[3:]) or len(calls) % 2)
    made_up(one=[KEPT], two=[MISSED])
    assert cli.main(["one", "two", "--save", "there"]) == 1
    assert [[*map(str, call)] for call in calls] == [[name, "--save", "there"] for name in ("one", "two")]
    assert cli.main(["one", "three"]) == 2 and len(calls) == 2


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_runs(made_up, tmp_path):
    made_up(one=None)
    (tmp_path / "file").touch()
    with pytest.raises(ParameterError, match="--save"):
        cli.main(["one", "--save", str(tmp_path / "file")])


def test_the_modules_here_keep_to_the_interface():
    assert {"lora", "memory", "overhead"} <= set(cli.names())
    for name in cli.names():
        module = cli.load(name)
        assert module.DESCRIPTION and module.TARGET and callable(module.run)


@pytest.mark.parametrize(
    ("claim", "ratio", "ok"),
    [(Claim("exactly at the target", 1.0, 1.0, 1.0), 1.0, True), (Claim("own ratio", 1, 1, 1.01, "s", 1.5), 1.5, False),
     (Claim("nothing to divide by", 1.0, 0.0, 1.0), float("inf"), False),
     (Claim("no number", float("nan"), 1.0, 1.0), None, False)],
)  # fmt: skip
def test_claim(claim, ratio, ok):
    assert claim.ok is ok and (ratio is None or claim.ratio == ratio)


def test_worst_is_relative_to_the_target_and_nan_is_worst_of_all():
    near, far, broken = Claim("", 1.01, 1, 1.0), Claim("", 1.2, 1, 1.5), Claim("", float("nan"), 1, 1.0)
    assert worst([far, near]) is near
    assert worst([near, broken, far]) is broken
    assert re.match(LAST_LINE, last_line("x", [broken]))
    assert "nan" in table([broken, near])


def test_interleave_alternates_and_takes_the_median_of_the_rounds(monkeypatch):
    calls, clock = [], [0.0]
    durations = {"ours": iter([9.0, 2.0, 3.0, 40.0]), "theirs": iter([9.0, 1.0, 2.0, 10.0])}

    def side(name):
        def call():
            calls.append(name)
            clock[0] += next(durations[name])

        return call

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timing = interleave(side("ours"), side("theirs"), rounds=3, warmup=1)
    assert calls == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert timing == Timing(ours=3.0, theirs=2.0, ratio=2.0, rounds=3)
    assert time_claim("step", timing, 1.0) == Claim("step", 3000.0, 2000.0, 1.0, "ms", 2.0)
