"""Lock files with kernel locks; only this module calls flock.

It never removes a regular file: a process may hold its lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ovm.errors import FileError, InUseError
from ovm.trust.files import advice

REPLACE_WAIT_S = 1.0
"""Timeout for another process that replaces the same path."""
LOOK_WAIT_S = 2.0
"""Timeout of a new owner for processes that only check whether the lock is held."""
TRIES = 5
"""Attempts to open a path that keeps changing."""
HELD_RETRY_S = 0.02
"""Retry interval for a held lock: flock has no timeout."""
NOTE_MAX_BYTES = 20
"""Size limit of the owner's process id, in digits."""

_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_lock(path: Path, *, create: bool = True, replace: bool = False) -> int:
    """Open the lock file at ``path``; the descriptor is not inheritable.

    Args:
        path: Its directory must exist.
        create: Create it with mode 0600 if it is missing, and open it for reading and writing. It must belong to this
            user and have a single name. Otherwise open any regular file for reading.
        replace: Remove a link, pipe, socket or device in its place.

    Raises:
        FileNotFoundError: it is missing, and ``create`` is false.
        FileError: it cannot be opened or created, or something else is in its place.
    """
    for _ in range(TRIES):
        if (fd := _opened(path, create=create)) is not None:
            return fd
        if (kind := _kind(path)) is None:
            continue  # it was just removed or replaced
        if kind == "a directory" or not replace:
            raise FileError(f"{path} is {kind} instead of a lock file", hint=f"remove {path}")
        _remove(path)
    raise FileError(f"{path} cannot be opened: it keeps changing", hint=f"find what writes to {path.parent}")


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Try to lock the open file ``fd`` without waiting; return whether it succeeded.

    The lock belongs to the open file: a child that inherits ``fd`` holds it too, and closing the last copy releases it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
            raise
        return False
    return True


def lock_within(fd: int, wait_s: float, *, shared: bool = False) -> bool:
    """Lock like :func:`try_lock`, but wait up to ``wait_s`` seconds for other owners."""
    deadline = time.monotonic() + wait_s
    while not try_lock(fd, shared=shared):
        if time.monotonic() > deadline:
            return False
        time.sleep(HELD_RETRY_S)
    return True


def unlock(fd: int) -> None:
    """Release the lock of the open file ``fd``, also for processes that have inherited it."""
    fcntl.flock(fd, fcntl.LOCK_UN)


@contextlib.contextmanager
def held(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold the lock file at ``path`` exclusively while inside. Its directory must exist; no child inherits the lock.

    Args:
        path: Created if missing.
        wait_s: Timeout for another owner, in seconds.

    Raises:
        InUseError: another process holds it; names the process.
        FileError: it cannot be opened or created.
    """
    fd = _locked(path, time.monotonic() + wait_s)
    try:
        with contextlib.suppress(OSError):  # on a full disk only the process id in other processes' messages is missing
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d" % os.getpid(), 0)
        yield
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def is_held(path: Path) -> bool:
    """Return whether a process owns the lock file at ``path``.

    The check takes the lock, shared, for a moment; :func:`owned` and :mod:`ovm.process.lock` wait for its end.
    """
    try:
        fd = open_lock(path, create=False)
    except (OSError, FileError):  # it is missing, or something else that cannot be locked is in its place
        return False
    try:
        return not try_lock(fd, shared=True)
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(fd)


def owned(path: Path, *, replace: bool = False) -> int | None:
    """Own the lock file at ``path`` without waiting for another owner; return ``None`` if there is one.

    It waits for processes that only check the lock, LOOK_WAIT_S at most. The descriptor is not inheritable and holds
    the lock until it is closed. Raises like :func:`open_lock`.
    """
    deadline = time.monotonic() + LOOK_WAIT_S
    fd = open_lock(path, replace=replace)
    try:
        while not try_lock(fd):
            if time.monotonic() > deadline or is_held(path):
                os.close(fd)
                return None
            time.sleep(HELD_RETRY_S)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _locked(path: Path, deadline: float) -> int:
    while True:
        fd = open_lock(path)
        try:
            is_ours = lock_within(fd, deadline - time.monotonic())
            if is_ours and os.fstat(fd).st_nlink:  # else the previous owner has removed the file
                return fd
        except OSError as error:
            os.close(fd)
            raise FileError(
                f"{path} cannot be locked: {error.strerror}", hint="choose a directory on a local file system"
            ) from error
        holder = os.pread(fd, NOTE_MAX_BYTES, 0).decode("ascii", "replace")
        os.close(fd)
        if not is_ours:
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise InUseError(f"{path} is held by {who}", hint=f"try again, or stop {who}")


def _opened(path: Path, *, create: bool) -> int | None:
    """Open a regular file; return ``None`` if something else is there."""
    try:
        fd = os.open(path, _SAFE | (os.O_RDWR | os.O_CREAT if create else os.O_RDONLY), 0o600)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not create:
            raise
        # raised for a link, a directory, a socket or a device without a driver; for a pipe on macOS
        if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EOPNOTSUPP, errno.ENODEV}:
            return None
        raise FileError(f"{path} cannot be opened: {error.strerror}", hint=advice(error, path)) from error
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_nlink:
        try:
            if create:
                _check_ours(path, status)
        except FileError:
            os.close(fd)
            raise
        return fd
    os.close(fd)
    return None


def _check_ours(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise FileError(
            f"{path} belongs to the user with id {status.st_uid}",
            hint="run ovm as that user, or choose another path",
        )
    if status.st_nlink > 1:
        raise FileError(
            f"{path} has a second hard link, so it may be another file", hint=f"stop the machine, then remove {path}"
        )


def _kind(path: Path) -> str | None:
    """Return what is at ``path`` in a lock file's place; ``None`` if it is nothing or a regular file."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)


def _remove(path: Path) -> None:
    """Remove what is there, unless another process has replaced it with a lock file."""
    try:
        with _alone(path.parent):
            if _kind(path) is not None:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{path} cannot be removed: {error.strerror}", hint=advice(error, path)) from error


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Lock ``directory``, so that no other process removes what is in a lock file's place there."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not lock_within(fd, REPLACE_WAIT_S):
            raise FileError(f"{directory} is locked by another program", hint="try again")
        yield
    finally:
        os.close(fd)
