"""Atomic writes: a file appears complete or not at all.

It is written under a temporary name beside its target, flushed and renamed. Until the rename its writer holds a kernel
lock on it. So a temporary file without a lock belongs to a run that died.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ovm.errors import FileError, SpaceError
from ovm.trust import directories
from ovm.trust.files import advice
from ovm.trust.locks import try_lock

TEMPORARY_PREFIX = ".ovm-new."
WRITERS_MAX = 1000
"""Number of concurrent writers of one name."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class NewFile:
    """A file under a temporary name. Each of several writers of one name has its own."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path, self.fd = _made(directory / (TEMPORARY_PREFIX + name))
        self._placed = False

    def seal(self, mode: int, *, durable: bool = True) -> None:
        """Set ``mode``, regardless of the umask, and make the content durable."""
        os.fchmod(self.fd, mode)
        if durable:
            sync(self.fd)

    def place(self, target: Path) -> None:
        """Rename it to ``target``; the name is durable after ``sync_directory``."""
        self.path.replace(target)
        self._placed = True
        self._close()  # after the rename: without its lock, another run would remove the temporary file

    def discard(self) -> None:
        """Remove it, unless it has been placed. If that fails, the next run removes it."""
        if not self._placed:
            self._placed = True
            with suppress(OSError):
                self.path.unlink()
        with suppress(OSError):
            self._close()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _made(path: Path) -> tuple[Path, int]:
    """Create and lock a file at ``path``, or beside it if another writer is there; return its path and descriptor."""
    for number in range(WRITERS_MAX):
        ours = path.with_name(f"{path.name}.{number}") if number else path
        _remove_abandoned(ours)
        with suppress(FileExistsError):
            fd = os.open(ours, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if _is_free(fd) and os.fstat(fd).st_nlink:
                    return ours, fd
            except OSError:
                os.close(fd)
                raise
            os.close(fd)  # another process took it for abandoned before it was locked
    raise FileExistsError(errno.EEXIST, "too many concurrent writers", os.fspath(path))


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file, unless its writer is alive."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        return
    except OSError:  # a link or a socket, which no writer of ovm creates
        path.unlink(missing_ok=True)
        return
    try:
        with suppress(FileNotFoundError):
            # compared once locked: another run may have removed it and a new writer taken its name
            if _is_free(fd) and os.path.samestat(os.fstat(fd), path.lstat()):
                path.unlink()
    finally:
        os.close(fd)


def _is_free(fd: int) -> bool:
    """Try to lock ``fd``; return false if another process holds the lock."""
    try:
        return try_lock(fd)
    except OSError:  # the file system has no locks; the directory's lock keeps other writers out
        return True


def write_whole(path: Path, content: bytes, mode: int, *, durable: bool = True) -> None:
    """Replace ``path`` with ``content``: a crash leaves the old file or the new one, a return the new one.

    A killed writer leaves a temporary file, which the next writer removes. Without ``durable``, a power cut may
    leave an empty file.
    """
    sweep(path.parent, path.name)
    new = NewFile(path.parent, path.name)
    try:
        write_at(new.fd, content, 0)
        new.seal(mode, durable=durable)
        new.place(path)
        if durable:
            sync_directory(path.parent)
    finally:
        new.discard()


def write_through(path: Path, content: bytes, mode: int, *, durable: bool = True) -> None:
    """Write like :func:`write_whole`, but follow links: the user's links stay.

    Raises:
        UntrustedError: a link leads to a directory where another user could replace the file.
        OSError: it cannot be written, or the link leads back to itself.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    if path.is_symlink():
        directories.check(target.parent)
    write_whole(target, content, mode, durable=durable)


def write_at(fd: int, content: bytes, offset: int) -> None:
    """Write all of ``content``; the kernel may take less at a time."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written


def start_writing(fd: int, offset: int, count: int) -> None:
    """Start to write these bytes of ``fd`` to the disk, so that ``sync`` has less to do. This makes nothing durable.

    Linux writes dirty pages before it drops them as POSIX_FADV_DONTNEED asks, and keeps them in memory meanwhile.
    """
    if advise := getattr(os, "posix_fadvise", None):
        with suppress(OSError):
            advise(fd, offset, count, os.POSIX_FADV_DONTNEED)


def sync(fd: int) -> None:
    """Make the content of ``fd`` survive a power cut."""
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves the data in the drive's cache
    if full is None:
        os.fsync(fd)
        return
    try:
        fcntl.fcntl(fd, full)
    except OSError:  # network file systems only support fsync
        os.fsync(fd)


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_path(directory: Path) -> None:
    """Make the names in ``directory`` and in its parents survive a power cut: it may be new itself."""
    sync_directory(directory)
    for above in directory.absolute().parents:
        with suppress(OSError):  # we may not open it, so we did not create it
            sync_directory(above)


def sweep(directory: Path, name: str = "") -> None:
    """Remove the temporary files of dead runs: all, or those whose target's name begins with ``name``."""
    with os.scandir(directory) as entries:
        found = [entry.name for entry in entries if entry.name.startswith(TEMPORARY_PREFIX + name)]
    for leftover in found:
        _remove_abandoned(directory / leftover)


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Convert OSError to ovm's errors; ``action`` is the first part of the message.

    Raises:
        SpaceError: the file system is full or cannot hold a file of that size.
        FileError: any other OSError.
    """
    try:
        yield
    except OSError as error:
        reason = f"{action}: {error.strerror or error}"
        if error.errno in _NO_ROOM:
            raise SpaceError(reason, hint="free some space, or choose a directory on another disk") from error
        name = error.filename2 or error.filename
        hint = advice(error, Path(os.fsdecode(name))) if isinstance(name, str | bytes) else ""
        raise FileError(reason, hint=hint) from error
