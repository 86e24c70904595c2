"""What is seen while something is at work: a bar in a terminal, lines in a log, nothing where outputs are compared."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from lorakit import progress
from lorakit.errors import ParameterError
from lorakit.progress import Progress

CURSOR = "\x1b[?25h"  # is shown again
FACTS = {"loss": 1.2345, "validation": 0.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def rows(self) -> list[str]:
        """What was drawn, frame after frame."""
        text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.getvalue())
        return [row for row in re.split(r"[\r\n]+", text) if row]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal with room for one width of row after another; styles as in one."""
    drawn = Terminal()

    def of(width: int = 80) -> Terminal:
        how = {"width": width, "color_system": None, "_environ": {"TERM": "xterm"}}
        monkeypatch.setattr(progress, "CONSOLE", Console(file=drawn, **how))
        return drawn

    monkeypatch.setenv("LORAKIT_PROGRESS", "bar")
    of()
    return of


@pytest.fixture
def clock(monkeypatch):
    now = [5000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize(
    ("environment", "style"),
    [({}, "bar"), ({"CI": "1"}, "none"), ({"PYTEST_VERSION": "9"}, "none"), ({"LORAKIT_PROGRESS": "plain"}, "plain"),
     ({"CI": "1", "LORAKIT_PROGRESS": "bar"}, "bar")],
)  # fmt: skip
def test_a_bar_is_drawn_where_somebody_may_watch(monkeypatch, terminal, environment, style):
    for name in ("CI", "PYTEST_VERSION", "LORAKIT_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Progress("run", 1, "steps").style == style


def test_a_bar_that_finds_no_terminal_is_lines(monkeypatch, terminal):
    for file, term in ((io.StringIO(), "xterm"), (Terminal(), "dumb")):
        console = Console(file=file, _environ={"TERM": term, "FORCE_COLOR": "1"})
        monkeypatch.setattr(progress, "CONSOLE", console)
        assert Progress("run", 1, "steps").style == "plain"


def test_an_unknown_style_is_refused(monkeypatch):
    monkeypatch.setenv("LORAKIT_PROGRESS", "bars")
    with pytest.raises(ParameterError, match="LORAKIT_PROGRESS='bars': must be bar, plain or none"):
        Progress("run", 1, "steps")


def test_lines_are_seconds_apart_but_the_last(monkeypatch, capsys, clock):
    monkeypatch.setenv("LORAKIT_PROGRESS", "plain")
    run = Progress("run", 20, "steps")
    told = [(5.0, 0.1), (5.5, 0.25), (10.5, 0.5), (10.75, 0.75), (10.8, 1.0), (10.9, 1.05)]
    for clock[0], share in told:
        run.update(share, {"loss": 1.2345} if share < 1 else {"loss": 2, "validation": 0.5})
    last = "run  100% of 20 steps  loss 2  validation 0.5"
    expected = ["run   25% of 20 steps  loss 1.23", "run   75% of 20 steps  loss 1.23", last, last]
    assert capsys.readouterr().out.splitlines() == expected


def test_one_line_says_why_the_others_stand_still(monkeypatch, capsys, clock):
    monkeypatch.setenv("LORAKIT_PROGRESS", "plain")
    run = Progress("toy/lora s0", 20, "steps")
    with run.doing("evaluating"):
        run.update(0.5, {"loss": 2})
        clock[0] += 9
    assert capsys.readouterr().out.splitlines() == ["toy/lora s0  evaluating", "toy/lora s0   50% of 20 steps  loss 2"]


@pytest.mark.parametrize(("width", "spent"), [(80, " 7/20 "), (120, " 7/20 accepted steps ")])
def test_a_row_is_as_wide_as_the_terminal(terminal, width, spent):
    run, drawn = Progress("toy/lora s0", 20, "accepted steps"), terminal(width)
    run.update(0.379, FACTS)
    run.close()
    run.close()  # and again
    row = drawn.rows()[-1]
    assert row.startswith("lora s0 ━━━") and spent in row and "0:00:00 --:-- loss 1.23  validation 0.5" in row
    assert len(row) == width - len("^C ") and drawn.getvalue().endswith("\n" + CURSOR)
    run.update(1.0, {})  # a new one
    run.close()
    assert " 20/20 " in drawn.rows()[-1]


def test_a_view_says_why_it_stands_still_until_it_moves_on(terminal, clock):
    run, drawn = Progress("toy/lora s0", 20, "accepted steps"), terminal()
    with run.doing("evaluating"):
        assert drawn.rows()[-1].rstrip().endswith("evaluating")
        clock[0] += 9
        run.update(0.5, FACTS)
        assert " 10/20 " in drawn.rows()[-1] and drawn.rows()[-1].rstrip().endswith("evaluating")
    assert drawn.rows()[-1].rstrip().endswith("validation 0.5")
    run.close()


def test_frames_are_not_drawn_faster_than_they_are_seen(terminal, clock):
    run, drawn = Progress("run", 1000, "steps"), terminal()
    for step in range(1, 500):
        clock[0] += 0.01
        run.update(step / 1000, FACTS)
    run.close()
    assert 40 <= drawn.getvalue().count("validation") <= 60


def test_what_is_printed_stands_above_the_rows_of_one_view(terminal, monkeypatch):
    drawn, before = terminal(), (Terminal(), Terminal())
    monkeypatch.setattr(sys, "stdout", before[0])
    monkeypatch.setattr(sys, "stderr", before[1])
    first, second = Progress("one", 2, "steps"), Progress("two", 2, "steps")
    first.update(0.5, {})
    second.update(1.0, {})
    print("a word", file=sys.stderr)
    print("another")
    second.close()
    first.close()
    assert (sys.stdout, sys.stderr) == before and not before[0].getvalue() + before[1].getvalue()
    text = drawn.getvalue()
    assert text.index("a word") < text.index("another") < text.rindex("one ━") and text.endswith("\n" + CURSOR)


def test_what_goes_into_a_file_stays_there(terminal, monkeypatch):
    drawn, file = terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    run = Progress("run", 2, "steps")
    run.update(0.5, {})
    print("a table")
    run.close()
    assert file.getvalue() == "a table\n" and "a table" not in drawn.getvalue()


def test_a_row_that_nobody_closes_is_closed_with_its_owner(terminal):
    run, drawn = Progress("run", 2, "steps"), terminal()
    run.update(0.5, {})
    assert not drawn.getvalue().endswith(CURSOR)
    del run
    assert drawn.getvalue().endswith(CURSOR)


def test_a_notebook_gets_the_widget(terminal, monkeypatch, capsys):
    terminal()
    monkeypatch.setattr(progress.CONSOLE, "is_jupyter", True)
    run = Progress("toy/lora s0", 60, "accepted steps")
    run.update(0.379, FACTS)
    with run.doing("evaluating"):
        run.update(0.5, FACTS)
    run.close()
    rows = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(row.startswith("lora s0  38% |") and ", 22/60 accepted steps  loss 1.23" in row for row in rows)
    assert any(row.rstrip().endswith("22/60 accepted steps  evaluating") for row in rows)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0.0, "0"), (59.9999999, "60"), (59.5, "59"), (46375, "46,375"), (1.5e6, "1.50M"), (8.78e10, "87.8G")],
)
def test_large_numbers_are_short(number, shown):
    assert progress._count(number) == shown
