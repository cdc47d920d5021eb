"""A file appears whole or not at all.

It grows under a temporary name beside its target, is flushed, and is renamed. The caller holds the
directory's lock, so whatever bears the temporary prefix when work begins belongs to a run that died.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ovm.errors import FileError, SpaceError

TEMPORARY_PREFIX = ".ovm-new."

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class NewFile:
    """A file that does not bear its name yet."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / (TEMPORARY_PREFIX + name)
        self.path.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.fd = os.open(self.path, flags, 0o600)
        self._placed = False

    def seal(self, mode: int) -> None:
        """Give it ``mode``, whatever the umask, and make its content durable."""
        os.fchmod(self.fd, mode)
        sync(self.fd)
        self._close()

    def place(self, target: Path) -> None:
        """Let it take the name ``target``; durable after ``sync_directory``."""
        self.path.replace(target)
        self._placed = True

    def discard(self) -> None:
        """Remove it, unless it has been placed. Where that fails the next run will."""
        with suppress(OSError):
            self._close()
        if not self._placed:
            with suppress(OSError):
                self.path.unlink()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Replace ``path`` by ``content``: after a crash it is the old one or the new one, and after return the new one."""
    new = NewFile(path.parent, path.name)
    try:
        write_at(new.fd, content, 0)
        new.seal(mode)
        new.place(path)
        sync_directory(path.parent)
    finally:
        new.discard()


def write_at(fd: int, content: bytes, offset: int) -> None:
    """All of ``content``; the kernel may take less at a time."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written


def start_writing(fd: int, offset: int, count: int) -> None:
    """Have the disk begin on these bytes of ``fd``. Makes nothing durable and is only a hint: ``sync`` has less to do.

    What Linux is told it may forget it writes first, and keeps it in memory as long as it writes.
    """
    if advise := getattr(os, "posix_fadvise", None):
        with suppress(OSError):
            advise(fd, offset, count, os.POSIX_FADV_DONTNEED)


def sync(fd: int) -> None:
    """Make the content of ``fd`` survive a power cut."""
    import fcntl

    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves it in the drive's own cache
    if full is None:
        os.fsync(fd)
        return
    try:
        fcntl.fcntl(fd, full)
    except OSError:  # network file systems know fsync only
        os.fsync(fd)


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_path(directory: Path) -> None:
    """Make the names in ``directory`` survive a power cut, and those that lead to it: it may be new itself."""
    sync_directory(directory)
    for above in directory.absolute().parents:
        with suppress(OSError):  # not ours to open, so not made by us
            sync_directory(above)


def sweep(directory: Path) -> None:
    """Remove what a run that died has left."""
    for leftover in directory.glob(TEMPORARY_PREFIX + "*"):
        leftover.unlink(missing_ok=True)


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Tell the operating system's errors in ovm's words: ``action`` is what could not be done.

    Raises:
        SpaceError: the file system is full, or cannot hold a file of that size.
        FileError: anything else the operating system refused.
    """
    try:
        yield
    except OSError as error:
        reason = f"{action}: {error.strerror or error}"
        if error.errno in _NO_ROOM:
            raise SpaceError(reason, hint="free some space, or choose a directory on another disk") from error
        raise FileError(reason) from error
