"""Style, types, who imports whom, shell scripts: the checks of scripts/lint, as tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("check", ["style", "format", "types", "imports", "shell"])
def test_source_is_clean(check):
    """The whole tree passes this check; what does not is printed as the tool says it."""
    if check == "shell" and not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([ROOT / "scripts" / "lint", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
