"""Processes watched by pidfds, which no later process can be mistaken for."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress


@contextmanager
def watching(pids: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """A pidfd for each of these processes; those that are still there at the end are killed."""
    watched = {}
    try:
        for name, pid in pids.items():
            watched[name] = os.pidfd_open(pid)
        yield watched
    finally:
        for fd in watched.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)


def gone_within(seconds: float, *pidfds: int) -> bool:
    """Whether all those processes have ended within ``seconds``."""
    deadline = time.monotonic() + seconds
    return all(select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0] for fd in pidfds)


def still_there(*pidfds: int) -> bool:
    """Whether none of them has ended."""
    return not select.select(pidfds, [], [], 0)[0]
