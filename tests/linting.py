"""scripts/lint beside the tests: ``pytest --lint``, which scripts/test uses."""

from __future__ import annotations

import concurrent.futures
import subprocess
from pathlib import Path

import pytest

LINT = Path(__file__).parents[1] / "scripts" / "lint"
LINT_TIMEOUT_S = 900.0


class Beside:
    """Runs lint from the beginning of the session; at its end prints what lint said, and fails if lint did."""

    def __init__(self, program: Path) -> None:
        # In a thread, which reaps it at its end: tests in between look for zombies.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "lint")
        self._done = self._pool.submit(
            subprocess.run,
            [program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LINT_TIMEOUT_S,
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Before pytest prints its summary, whose last line stays the last."""
        try:
            done = self._done.result()
            said, ok = done.stdout, done.returncode == 0
        except (OSError, subprocess.TimeoutExpired) as error:
            said, ok = f"{error}\n", False
        self._pool.shutdown()
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.section("lint")
            reporter.write(said)
        if not ok and session.exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
