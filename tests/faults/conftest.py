"""The table of the fault suite, behind pytest's summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import soak

if TYPE_CHECKING:
    import pytest


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """What was generated gets its line in the table, too."""
    generated = item.get_closest_marker("generated")
    if generated and call.when == "call":
        what = f"{generated.args[0]} generated: {item.name.removeprefix('test_').replace('_', ' ')}"
        soak.row(what, "typed error or success", "no other" if call.excinfo is None else "another: see above")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Only if something was counted."""
    if soak.rows:
        terminalreporter.section(f"{soak.TENTHS} tenths of the full counts, seed {soak.SEED}")
        terminalreporter.write_line(soak.machine())
        terminalreporter.write_line(soak.table(soak.rows))
