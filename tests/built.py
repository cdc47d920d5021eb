"""What tests need and build once: kept in ``.cache`` under the digest of what it is made of."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"
TOOLS = CACHE / "tools"

UNUSED_S = 86400.0
"""Builds of other digests are removed when no run has used them for so long: another checkout may share the cache."""


@contextlib.contextmanager
def once(directory: Path, kind: str) -> Iterator[bool]:
    """Whether ``directory``, whose name is ``kind``, a dash and a digest, is still to be built; the block does so.

    Meanwhile other processes that want one of this kind wait.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not directory.exists()
        os.utime(directory)  # used now
        _remove_unused(directory, kind)


@contextlib.contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A path to build at; what is there at the end becomes ``directory``, and nothing does if the block fails."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".building-") as building:
        new = Path(building) / directory.name
        yield new
        new.rename(directory)


def _remove_unused(directory: Path, kind: str) -> None:
    for other in directory.parent.glob(f"{kind}-*"):
        if other != directory and other.is_dir() and time.time() - other.stat().st_mtime > UNUSED_S:
            shutil.rmtree(other)
