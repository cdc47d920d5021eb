"""The table of the fault suite, behind pytest's summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import soak

if TYPE_CHECKING:
    import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Only if something was counted."""
    if soak.rows:
        terminalreporter.section(f"{soak.TENTHS} tenths of the full counts, seed {soak.SEED}")
        terminalreporter.write_line(soak.machine())
        terminalreporter.write_line(soak.table(soak.rows))
