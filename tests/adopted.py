"""Orphans of this process's descendants: it adopts them, so that none is missed, whatever group or session it is in."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


class Adopted:
    """What lives below this process, but for what was there before; :func:`adopting` makes one."""

    def __init__(self) -> None:
        self.known = set(below(os.getpid()))
        """Processes that are to be left alone, and what is below them."""

    def left(self) -> list[int]:
        """Those that are there. What has ended is reaped on the way, as init would."""
        found = []
        for pid, state in below(os.getpid()).items():
            if pid in self.known:
                continue
            if state == "Z":
                with suppress(ChildProcessError):  # its own parent will
                    os.waitpid(pid, os.WNOHANG)
            found.append(pid)
        return found


@contextmanager
def adopting() -> Iterator[Adopted]:
    """While inside, what has lost its parent becomes a child of this process. Linux alone can."""
    _adopt(1)
    try:
        yield Adopted()
    finally:
        _adopt(0)


def _adopt(whether: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, whether, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())


def below(root: int) -> dict[int, str]:
    """All descendants of a process, with their states."""
    children: dict[int, dict[int, str]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
                children.setdefault(int(parent), {})[int(process.name)] = state
    found: dict[int, str] = {}
    wanted = [root]
    while wanted:
        below = children.get(wanted.pop(), {})
        found |= below
        wanted += below
    return found
