"""After the campaigns one table: what was tried, what survived, and how each fault is repeated."""

from __future__ import annotations

import pytest
from faults import campaign


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if campaign.RESULTS:
        terminalreporter.section("faults")
        terminalreporter.write_line("\n".join(campaign.table()))
