"""One owner of a directory, by kernel lock.

The lock belongs to an open file, and every helper inherits that file. So a lock that is free means
that the manager *and* its last helper are gone, whatever became of them; no pid is ever believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import json
import os
import sys
import time
import weakref
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from ovm.errors import FileError, InUseError
from ovm.paths import LOCK

GOING_S = 5.0
"""The last helpers of a manager that was killed are gone by then; a running machine is not."""
RETRY_S = 0.05
"""flock cannot wait with a deadline, so a held lock is tried again this often."""


class Lock:
    """Kernel locks on some directories; :func:`hold` makes one."""

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds
        _open_locks().add(self)

    def close(self) -> None:
        """Let go. The lock stays held for as long as a helper has inherited it."""
        while self.fds:
            os.close(self.fds.pop())


@contextlib.asynccontextmanager
async def hold(directories: Iterable[Path], *, wait_s: float, brief: bool = False) -> AsyncIterator[Lock]:
    """Own ``directories`` while inside; waits for an owner that is about to go.

    Args:
        directories: Each must exist.
        wait_s: How long to wait, in seconds; for an owner that is not brief GOING_S at most.
        brief: Whether this is for a piece of work that comes to its end by itself.

    Raises:
        InUseError: somebody else owns one of them; says who.
        FileError: the lock file cannot be made.
    """
    lock = Lock([])
    began = time.monotonic()
    try:
        for directory in await asyncio.to_thread(_distinct, directories):
            # in no thread: if we were cancelled meanwhile, it would leave us with a lock that nobody knows of
            while (fd := _try(directory, brief=brief)) is None:
                waited = time.monotonic() - began
                if waited >= wait_s or (waited >= GOING_S and not _told(directory).get("brief")):
                    raise InUseError(
                        f"{directory} is in use by {await asyncio.to_thread(_owner, directory)}",
                        hint="stop that machine first, or give this one directories of its own",
                    )
                await asyncio.sleep(RETRY_S)
            lock.fds.append(fd)
        yield lock
    finally:
        lock.close()


def _distinct(directories: Iterable[Path]) -> list[Path]:
    """Each directory once, in the same order for everybody, so that two starts cannot wait for each other."""
    return sorted({directory.resolve() for directory in directories})


def _try(directory: Path, *, brief: bool) -> int | None:
    path = directory / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise FileError(
            f"cannot lock {directory}: {error.strerror}", hint="check that the directory is yours and writable"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
            raise FileError(
                f"cannot lock {directory}: {error.strerror}", hint="choose a directory on a local file system"
            ) from error
        return None
    owner = {"pid": os.getpid(), "program": sys.argv[0], "since": time.time(), "brief": brief}
    with contextlib.suppress(OSError):  # a full disk takes the name from the message, not the lock from us
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(owner).encode(), 0)
    return fd


def _told(directory: Path) -> dict[str, Any]:
    """What the last owner wrote into the lock file, which is for people and for patience only."""
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((directory / LOCK).read_bytes())
        if isinstance(told, dict):
            return told
    return {}


def _owner(directory: Path) -> str:
    told = _told(directory)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["since"]))
        return f"process {int(told['pid'])} ({told['program'] or 'python'}), since {since}"
    except (ValueError, TypeError, KeyError, OverflowError):
        return "another process"


@functools.cache
def _open_locks() -> weakref.WeakSet[Lock]:
    """The locks of this process, which a forked child must not keep: it would hold them past our death."""
    locks: weakref.WeakSet[Lock] = weakref.WeakSet()

    def forget() -> None:
        for lock in tuple(locks):
            lock.close()

    os.register_at_fork(after_in_child=forget)
    return locks
