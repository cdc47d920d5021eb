"""The suites as their projects publish them on PyPI, and the virtual environment that they run in."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from suites.plan import REQUIREMENTS, Suite


def sdist(suite: Suite, work: Path) -> Path:
    """The unpacked sdist that has the suite's tests; fetched once."""
    name = f"{suite.project}-{suite.tests_version}"
    unpacked = work / name
    if not unpacked.exists():
        archives = work / "archives"
        # fmt: off
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                "--no-binary", suite.project, "--dest", archives, f"{suite.project}=={suite.tests_version}",
            ],
            check=True,
        )
        # fmt: on
        with tarfile.open(archives / f"{name}.tar.gz") as tar:
            kept = f"{name}/{suite.unpacked}"
            tar.extractall(work, [member for member in tar if member.name.startswith(kept)], filter="data")
    return unpacked


def python(work: Path) -> Path:
    """An interpreter with the clients and what their tests import; made once for each list of requirements."""
    digest = hashlib.sha256("\n".join((sys.version, *REQUIREMENTS)).encode()).hexdigest()[:16]
    directory = work / f"venv-{digest}"
    interpreter = directory / "bin" / "python"
    done = directory / "done"
    if not done.exists():
        venv.create(directory, with_pip=True, clear=True)
        pip = [os.fspath(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        done.touch()
    return interpreter
