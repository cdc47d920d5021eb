"""macOS's way of sharing a file's blocks, built for this system."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "doubles" / "clonefile" / "clonefile.c"


def build(directory: Path) -> Path:
    """A C library with ``fclonefileat``; the test is skipped where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = directory / "clonefile.so"
    argv = [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", path, SOURCE]
    built = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return path
