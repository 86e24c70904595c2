"""One live view of what is at work: a bar in a terminal, a widget in Jupyter, lines where there is neither."""

import contextlib
import functools
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping

from rich import progress as bars
from rich.console import Console
from rich.constrain import Constrain
from tqdm import tqdm

from lorakit.errors import require

ROOM = len("loss 0.123  validation 0.123")  # kept free, so that the bar keeps its length
CONSOLE = Console(stderr=True)  # one for all, so that several bars share a view


class Progress:
    """A person can watch how much is done, how long it took and will take, and the latest numbers.

    LORAKIT_PROGRESS: "bar" (default), "plain" (a line every few seconds, for logs and batch runs; also where a bar has
    no terminal) or "none" (default where CI is set and under pytest, whose nbval compares what a cell prints).

    Args:
        title: "setting/row", and the seed; amount, unit: what all of it is.

    Raises:
        ParameterError: LORAKIT_PROGRESS says something else.
    """

    SECONDS_BETWEEN = {"plain": 5.0, "bar": 0.1}

    def __init__(self, title: str, amount: float, unit: str):
        self.title, self.amount, self.unit = title, amount, unit
        watched = not (os.environ.get("CI") or os.environ.get("PYTEST_VERSION"))
        self.style = os.environ.get("LORAKIT_PROGRESS") or ("bar" if watched else "none")
        require(self.style in ("bar", "plain", "none"), "LORAKIT_PROGRESS", self.style, "must be bar, plain or none")
        if self.style == "bar" and not (CONSOLE.is_jupyter or CONSOLE.file.isatty() and CONSOLE.is_interactive):
            self.style = "plain"
        self._share, self._spent, self._facts, self._doing, self._last = 0.0, 0.0, {}, "", 0.0
        self._draw = self._end = None

    def update(self, share: float, facts: Mapping[str, float | str], spent: float | None = None) -> None:
        """What cannot be shown ends no run.

        Args:
            share: in [0, 1]; facts: name -> latest number, shown beside it; spent: where it is not that share of all.
        """
        self._share, self._facts = min(share, 1.0), facts
        self._spent = self._share * self.amount if spent is None else spent
        if share >= 1 or time.monotonic() - self._last > self.SECONDS_BETWEEN.get(self.style, math.inf):
            self._last = time.monotonic()
            self._show()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, a view says that this is why it stands still; of lines, one says so."""
        self._doing = what
        self._show()
        self._doing = what if self.style == "bar" else ""
        try:
            yield
        finally:
            self._doing = ""
            if self.style == "bar":
                self._show()

    def close(self) -> None:
        """Leave on the screen where it stands."""
        with contextlib.suppress(OSError, ValueError):
            if self._end:
                self._end()
        self._draw = self._end = None

    def _show(self) -> None:
        values = ((name, value if isinstance(value, str) else f"{value:.3g}") for name, value in self._facts.items())
        said = self._doing or "  ".join(map(" ".join, values))
        try:
            if self.style == "plain":
                far = "" if self._doing else f"{self._share:4.0%} of {_count(self.amount)} {self.unit}  "
                print(f"{self.title}  {far}{said}", flush=True)
            elif self.style == "bar":
                if self._draw is None:
                    opened = _widget if CONSOLE.is_jupyter else _bar
                    self._draw, end = opened(self.title.rpartition("/")[2], self._share)
                    self._end = weakref.finalize(self, end)  # at the latest when the program ends
                unit = f" {self.unit}" if CONSOLE.is_jupyter or CONSOLE.width >= 100 else ""  # where there is room
                spent = f"{_count(self._spent)}/{_count(self.amount)}{unit}"
                self._draw(completed=self._share, spent=spent, said=f"{said:{ROOM}}")
        except (OSError, ValueError):  # a full log, a closed pipe, a closed file
            self.close()
            self.style = "none"


class _Row(bars.Progress):
    """Narrower than the terminal, so that a `^C` typed there does not break its line."""

    def get_renderables(self) -> Iterator[Constrain]:
        yield Constrain(self.make_tasks_table(self.tasks), CONSOLE.width - 3)


def _bar(title: str, share: float) -> tuple[Callable[..., None], Callable[[], None]]:
    """A row of the terminal, without a thread of its own: how to draw it and how to end it."""
    texts = ("{task.description}", "{task.fields[spent]}", "{task.fields[said]}")
    name, spent, said = (bars.TextColumn(text, markup=False) for text in texts)
    times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn(compact=True)
    how = {"console": CONSOLE, "auto_refresh": False, "speed_estimate_period": math.inf, "expand": True}
    # what is printed while it is there stands above it; into a file it goes as ever
    row = _Row(name, bars.BarColumn(None), spent, *times, said, redirect_stdout=sys.stdout.isatty(), **how)
    task = row.add_task(title, total=1.0, completed=share, spent="", said="")
    row.live.start()  # nothing is drawn yet
    return functools.partial(row.update, task, refresh=True), row.stop


def _widget(title: str, share: float) -> tuple[Callable[..., None], Callable[[], None]]:
    """The same in a notebook."""
    from tqdm.auto import tqdm

    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
    row = tqdm(total=1.0, initial=share, desc=title, bar_format=form)

    def draw(completed: float, spent: str, said: str) -> None:
        row.n = completed
        row.set_postfix_str(f"{spent}  {said}")

    return draw, row.close


def _count(number: float) -> str:
    """Whole numbers, those past 100,000 in thousands, millions, …"""
    return f"{math.floor(number + 1e-6):,}" if number < 1e5 else tqdm.format_sizeof(number)
