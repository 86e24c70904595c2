"""`make gpu`, rehearsed at tiny sizes: each part's record, what is refused, skipped and failed; the page of records."""

from __future__ import annotations

import gc
import json
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import benchmarks._gpu.__main__ as cli
from benchmarks._common import Claim, told
from benchmarks._gpu import comparing, memory, page, suite, times
from benchmarks._gpu.comparing import TINY, Comparison, tried

# one of each kind; `python -m benchmarks._gpu --rehearse FOLDER` tries all
QUICK = ("fractional 20 %: peak", "bf16: LoRA over PEFT's", "update over the exact", "bf16: accepted", "waits, LoRA")
QUICK += ("cached half", "best quarter")
SUITE = """
import pytest
pytestmark = pytest.mark.cuda
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
"""
WHERE = {"device": "NVIDIA H200", "versions": {"torch": "2.11.0", "trl": None}, "gpu": {"driver": "580.1"}}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a rehearsal, of a few comparisons of each kind."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "test_unread.py").write_text("import no_such_module")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "files", lambda: sorted(folder.glob("test_*.py")))
        for module in (memory, times):
            every = module.comparisons(TINY, "cpu")
            some = [one for one in every if any(name in one.name for name in QUICK)]
            patch.setattr(module, "comparisons", lambda sizes, device, some=some: some)
        flags = torch.backends.mkldnn.flags(enabled=False)  # its products take room of their own, see test_memory
        gc.freeze()  # what is there need not be looked through before each timing
        with flags:
            assert cli.main(["--rehearse", str(folder / "made")]) == 1  # a test fails
        gc.unfreeze()
    return folder / "made"


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card that is not there, whose parts measure nothing; the list of those asked for, and the record's place."""
    asked, parts = (
        [],
        {
            "tests": {"passed": 3, "failed": {}, "skipped": {"a::b": "no liger"}},
            "memory": {"claims": [told(Claim("peak", 1.0, 2.0, 1.1, "MiB"))], "not_measured": {}},
            "time": {"claims": [told(Claim("step", 1.0, 2.0, 1.0, "ms"))], "not_measured": {}},
        },
    )

    def measured(name, *told):
        asked.append((name, *told))
        return parts[name]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(cli, "PARTS", {name: partial(measured, name) for name in parts})
    monkeypatch.setattr(cli, "machine", lambda device: WHERE)
    monkeypatch.setattr(page, "RECORDS", tmp_path / "gpu")
    monkeypatch.setattr(page, "PAGE", tmp_path / "docs" / "gpu.md")
    return asked, tmp_path / "gpu" / "nvidia-h200.json"


def test_a_rehearsal_leaves_a_record_of_each_part_and_a_page_in_its_folder(rehearsed):
    assert sorted(path.name for path in rehearsed.iterdir()) == ["gpu.md", "rehearsal.json"]
    record = json.loads((rehearsed / "rehearsal.json").read_text())
    assert record["card"] == "rehearsal" and record["rehearsal"] is True
    tests, *others = (record["parts"][name] for name in ("tests", "memory", "time"))
    assert tests["passed"] == 1
    assert {*tests["skipped"].values()} == {"no reason", "ModuleNotFoundError: No module named 'no_such_module'"}
    ((name, why),) = tests["failed"].items()
    assert name.endswith("::test_bad") and "assert 1 == 2" in why
    for part in (tests, *others):
        assert part["date"] and part["machine"]["versions"].keys() >= {"torch", "transformers", "trl", "flash-attn"}
    for part, count in zip(others, (1, 6), strict=True):
        assert len(part["claims"]) == count and not part["not_measured"]
        assert all(claim["ours"] > 0 and claim["theirs"] > 0 for claim in part["claims"])
    if not torch.cuda.is_available():  # there the allocator rounds, and libraries take room of their own
        assert all(claim["ratio"] < 1.02 for claim in others[0]["claims"])
    assert others[1]["claims"][-1]["ok"]  # a deeper model does not wait more often
    text = (rehearsed / "gpu.md").read_text()
    assert f"1 passed, 1 failed, 2 skipped.\n\n- failed: `{name}`: " in text
    assert "**A rehearsal**" in text and "| missed |" not in text and "| ok |" not in text


def test_the_page_says_what_the_records_say():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(page.records()), "make gpu PART=page"


def test_without_a_record_the_page_lists_what_would_be_measured():
    text = page.page([])
    assert "**Not measured**" in text and "## Tests\n" in text and "`tests/measure/test_memory.py`" in text
    for one in (*memory.comparisons(comparing.REAL, "cuda"), *times.comparisons(comparing.REAL, "cuda")):
        goal = "" if one.target == float("inf") else f"{one.target:.2f}"
        assert f"| {one.name} | | | | | {goal} | not measured |\n" in text


def test_a_card_has_its_record_and_a_part_that_is_there_is_left_alone(card, capsys):
    asked, path = card
    assert cli.main(["--part", "memory"]) == 0
    assert asked == [("memory", comparing.REAL, "cuda")] and not page.PAGE.exists()
    before = path.read_text()
    assert [*json.loads(before)["parts"]] == ["memory"]
    assert cli.main(["--part", "memory"]) == 0 and len(asked) == 1 and path.read_text() == before
    assert "memory: there already" in capsys.readouterr().out
    assert cli.main(["--part", "memory", "--again"]) == 0 and len(asked) == 2
    assert cli.main([]) == 0 and [name for name, *_ in asked[2:]] == ["tests", "time"]
    text = page.PAGE.read_text(encoding="utf-8")
    assert "## NVIDIA H200\n" in text and "3 passed, 0 failed, 1 skipped.\n\n- skipped: `a::b`: no liger\n" in text
    assert (
        "| step | 1.0 | 2.0 | ms | 0.500 | 1.00 | ok |\n" in text
        and "NVIDIA H200, driver 580.1, torch 2.11.0.\n" in text
    )
    assert "Not measured**" not in text and "| not measured |" in text  # of the real claims


@pytest.mark.parametrize(
    "claim", [Claim("late", 3.0, 2.0, 1.0), "failed: ValueError: no", "skipped: too small (8.0 GiB)"]
)
def test_what_is_missed_or_failed_is_the_exit_status_and_on_the_page(card, claim):
    made = isinstance(claim, Claim)
    part = {"claims": [told(claim)] if made else [], "not_measured": {} if made else {"late": claim}}
    cli.PARTS["time"] = lambda sizes, device: part
    assert cli.main(["--part", "time"]) == (0 if "skipped" in str(claim) else 1)
    assert cli.main(["--part", "page"]) == 0
    assert f"| {'missed' if made else claim} |\n" in page.PAGE.read_text(encoding="utf-8")


def test_a_part_that_does_not_exist(capsys):
    assert cli.main(["--part", "speed"]) == 2
    assert capsys.readouterr().err == "PART='speed': must be one of tests, memory, time, page; left out: all\n"


def test_without_cuda_nothing_is_measured_but_the_page_is_written(card, monkeypatch, capsys):
    asked, path = card
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for part in ("", "tests", "memory", "time"):
        assert cli.main(["--part", part]) == cli.NOTHING_MEASURED
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("no CUDA device: nothing was measured")
    assert not asked and not path.exists() and not page.PAGE.exists()
    assert cli.main(["--part", "page"]) == 0 and "**Not measured**" in page.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("place", ["benchmarks/measured/gpu", "benchmarks/measured/gpu/new", "docs"])
def test_a_rehearsal_stays_away_from_what_was_measured(place, capsys):
    assert cli.main(["--rehearse", str(page.PROJECT / place)]) == 2
    assert "--rehearse=" in capsys.readouterr().err


def test_a_comparison_that_cannot_be_made_takes_no_other_with_it(monkeypatch):
    def fails(error):
        raise error

    monkeypatch.setattr("gc.collect", lambda: 0)  # seconds here
    monkeypatch.setattr(comparing, "gib", lambda: 23.64)
    good = Comparison("good", 1.0, lambda: Claim("good", 1.0, 1.0, 1.0))
    asked = [Comparison("large", 1.0, lambda: fails(torch.cuda.OutOfMemoryError("CUDA out of memory"))),
             Comparison("broken", 1.0, lambda: (lambda: fails(ValueError("two\nlines")), time.time)),
             Comparison("absent", 1.0, lambda: fails(KeyError()), "no_such_module"),
             Comparison("older", 1.0, lambda: fails(ImportError("cannot import name 'it'"))), good]  # fmt: skip
    found = tried(asked, TINY, "cpu")
    assert [claim["name"] for claim in found["claims"]] == ["good"]
    assert found["not_measured"] == {
        "large": "skipped: too small (23.6 GiB)",
        "broken": "failed: ValueError: two lines",
        "absent": "skipped: no_such_module is not installed",
        "older": "skipped: cannot import name 'it'",
    }
    monkeypatch.setattr(comparing, "LAST_START", -1)
    assert tried([good], TINY, "cpu")["not_measured"] == {"good": "skipped: the part's 8 minutes were over"}


def test_a_value_read_back_in_every_layer_is_a_claim_missed():
    def step(layers):
        return lambda: [torch.ones(3).sum().item() for _ in range(layers)]

    claim = times.waits_claim("waits", step, "cpu")
    assert (claim.ours, claim.theirs, claim.ok) == (4, 2, False)


def test_a_suite_that_does_not_end_has_failed(monkeypatch):
    monkeypatch.setattr(suite, "MINUTES", 0)
    assert suite.run(TINY, "cpu") == {"passed": 0, "failed": {"pytest": "TimeoutExpired"}, "skipped": {}}


def test_what_nvidia_smi_says_is_kept_and_its_absence_is_quiet(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(uuid="ab-cd", total_memory=2**34)
    )
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="580.1, 1980 MHz, 1980 MHz, 700.00 W\n")

    monkeypatch.setattr("subprocess.run", run)
    assert cli._queried() == {"driver": "580.1", "clock": "1980 MHz", "highest clock": "1980 MHz", "power": "700.00 W"}
    assert asked[0][:3] == ["nvidia-smi", "-i", "GPU-ab-cd"]
    monkeypatch.setattr("subprocess.run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert cli._queried() == {}
