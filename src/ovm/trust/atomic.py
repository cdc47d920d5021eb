"""A file appears whole or not at all.

It grows under a temporary name beside its target, is flushed, and is renamed. As long as it has the temporary name, its
writer holds a kernel lock on it. So a temporary file that is not locked belongs to a run that died.
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
"""Writers of one name at once."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class NewFile:
    """A file that does not bear its name yet. Several writers of one name do not touch each other's."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path, self.fd = _made(directory / (TEMPORARY_PREFIX + name))
        self._placed = False

    def seal(self, mode: int, *, durable: bool = True) -> None:
        """Give it ``mode``, whatever the umask, and make its content durable."""
        os.fchmod(self.fd, mode)
        if durable:
            sync(self.fd)

    def place(self, target: Path) -> None:
        """Let it take the name ``target``; durable after ``sync_directory``."""
        self.path.replace(target)
        self._placed = True
        self._close()

    def discard(self) -> None:
        """Remove it, unless it has been placed. Where that fails the next run will."""
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
    """A new file at ``path``, or beside it if somebody is writing there, locked; and its descriptor."""
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
            os.close(fd)  # somebody took it for abandoned, before it was locked
    raise FileExistsError(errno.EEXIST, "too many write it at once", os.fspath(path))


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file, unless its writer lives."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        return
    except OSError:  # a link or a socket, which is none of ours
        path.unlink(missing_ok=True)
        return
    try:
        with suppress(FileNotFoundError):
            if _is_free(fd) and os.path.samestat(os.fstat(fd), path.lstat()):
                path.unlink()
    finally:
        os.close(fd)


def _is_free(fd: int) -> bool:
    """Whether nobody else holds the lock of ``fd``, which is ours then."""
    try:
        return try_lock(fd)
    except OSError:  # the file system has no locks: whoever holds the lock of the directory is alone
        return True


def write_whole(path: Path, content: bytes, mode: int, *, durable: bool = True) -> None:
    """Replace ``path`` by ``content``: after a crash it is the old one or the new one, and after return the new one.

    A writer that is killed leaves a temporary file, which the next one removes. Without ``durable``, a power cut may
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
    """Write as :func:`write_whole` does the file that ``path`` is, or leads to: links of the user stay.

    Raises:
        UntrustedError: a link leads to where another user could exchange the file.
        OSError: it cannot be written; a link that leads back to itself, too.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    if path.is_symlink():
        directories.check(target.parent)
    write_whole(target, content, mode, durable=durable)


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


def sweep(directory: Path, name: str = "") -> None:
    """Remove the temporary files that runs which died have left: all, or those whose targets' names begin so."""
    with os.scandir(directory) as entries:
        found = [entry.name for entry in entries if entry.name.startswith(TEMPORARY_PREFIX + name)]
    for leftover in found:
        _remove_abandoned(directory / leftover)


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
        name = error.filename2 or error.filename
        hint = advice(error, Path(os.fsdecode(name))) if isinstance(name, str | bytes) else ""
        raise FileError(reason, hint=hint) from error
