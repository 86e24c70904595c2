"""Progress a person can watch: a bar, plain lines where a bar cannot be drawn, nothing under CI."""

from __future__ import annotations

import os
import time


class Progress:
    """Shows the share of the budget spent.

    LORAKIT_PROGRESS: "bar" (default), "plain" (a line every few seconds, for logs and batch runs) or "none"
    (default where CI is set and under pytest, whose nbval compares what a cell prints).
    """

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, title: str, amount: float, unit: str):
        self.title, self.amount, self.unit = title, amount, unit
        watched = not (os.environ.get("CI") or os.environ.get("PYTEST_VERSION"))
        self.style = os.environ.get("LORAKIT_PROGRESS") or ("bar" if watched else "none")
        self._last_line = 0.0
        self._bar = None

    def update(self, share: float, facts: dict[str, float]) -> None:
        """`share` in [0, 1]; `facts`: name -> latest number, shown beside it."""
        share = min(share, 1.0)
        if self.style == "bar":
            self._draw_bar(share, facts)
        elif self.style == "plain" and (share >= 1 or time.monotonic() - self._last_line > self.SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            shown = "  ".join(f"{name} {value:.3g}" for name, value in facts.items())
            print(f"{self.title}  {share:4.0%} of {self.amount:g} {self.unit}  {shown}", flush=True)

    def _draw_bar(self, share: float, facts: dict[str, float]) -> None:
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=100, desc=self.title, unit="%", bar_format="{desc} {percentage:3.0f}% |{bar}| {postfix}"
            )
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in facts.items()}, refresh=False)
        self._bar.update(int(100 * share) - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
