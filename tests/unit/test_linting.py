"""Lint beside the tests: what it says is printed before the summary, and its failure is the run's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PLUGIN = "import linting, os, pathlib\ndef pytest_configure(config):\n    program = pathlib.Path(os.environ['LINT'])\n"
PLUGIN += "    config.pluginmanager.register(linting.Beside(program))\n"


@pytest.mark.parametrize("status", [0, 1])
def test_lint_counts_and_the_summary_is_last(tmp_path, status):
    """A run of good tests fails if lint does; what lint said comes before pytest's last line, however long it takes."""
    program = tmp_path / "lint"
    program.write_text(f"#!/bin/sh\nsleep 0.2; echo said; exit {status}\n")
    program.chmod(0o755)
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    environment = os.environ | {"LINT": str(program), "PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    argv = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    *before, last = done.stdout.strip().splitlines()
    assert "said" in before
    assert "1 passed in " in last
