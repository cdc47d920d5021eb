"""Copying between files, with holes kept as holes.

The loops are generators that yield their progress, so the caller can stop them in between.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ovm.trust.atomic import start_writing, write_at
from ovm.trust.locks import try_lock

if TYPE_CHECKING:
    import ctypes

CHUNK_BYTES = 8 * 1024 * 1024
BLOCK_BYTES = 4096
"""Zeros are left out in units of this size, the block of nearly every file system."""

_READ_BYTES = 1024 * 1024
_FICLONE = 0x40049409
_AT_FDCWD = -2
"""The value on macOS."""
_CLONE_NOOWNERCOPY = 2
_ZEROS = bytes(_READ_BYTES)
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_ELSEWHERE_ONLY = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES}
)
"""Errors by which kernels and sandboxes reject a copy method for two files; another method may work."""


def clone(source: int, target: int, path: Path) -> bool:
    """Make ``target``, a new file open at ``path``, share the blocks of ``source``.

    Returns False, and changes nothing, where the file system cannot.
    """
    how = _CLONERS.get(sys.platform)
    return how is not None and how(source, target, path)


def clone_blocks(source: int, target: int, path: Path) -> bool:
    """Clone into an open file, as Linux does (btrfs, xfs, …)."""
    del path
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _ELSEWHERE_ONLY:
            return False
        raise
    return True


def clone_by_name(source: int, target: int, path: Path) -> bool:
    """Clone to a new name, as macOS does (APFS), then replace ``path`` with it and reopen ``target`` on it.

    The clone keeps the extended attributes of its origin.
    """
    beside = path.with_name(path.name + ".clone")
    if _fclonefileat(source, beside):
        return False  # any other cause makes the plain copy fail, too, and is reported there
    try:
        if chflags := getattr(os, "chflags", None):
            chflags(beside, 0)  # the clone of a locked file is locked
        beside.chmod(0o600)
        opened = os.open(beside, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        beside.unlink()
        return False
    try:
        with suppress(OSError):
            try_lock(opened)  # a temporary file is locked, see trust/atomic.py
        beside.replace(path)
        os.dup2(opened, target, inheritable=False)
    finally:
        os.close(opened)
    return True


_CLONERS: dict[str, Callable[[int, int, Path], bool]] = {"linux": clone_blocks, "darwin": clone_by_name}


def copy(source: int, target: int, size: int) -> Iterator[int]:
    """Copy ``size`` bytes, holes as holes; yield the bytes done, ``size`` at last unless the source ended early."""
    os.ftruncate(target, size)
    for start, end in data_ranges(source, size):
        at = start
        while at < end:
            copied = _copy_some(source, target, at, min(CHUNK_BYTES, end - at))
            if not copied:
                return
            at += copied
            yield at
    yield size


def write(target: int, size: int, pieces: Iterable[bytes]) -> Iterator[int]:
    """Write ``pieces``, ``size`` bytes in all, with holes for blocks of zeros; yield the bytes done."""
    os.ftruncate(target, size)
    for offset, data in data_runs(pieces):
        write_at(target, data, offset)
        yield offset + len(data)
    yield size


def written_early(target: int, steps: Iterable[int]) -> Iterator[int]:
    """Yield ``steps``, the bytes done of ``target``, and start writeback early, so the flush has less left to do."""
    begun = 0
    for done in steps:
        if done - begun >= CHUNK_BYTES:
            start_writing(target, begun, done - begun)
            begun = done
        yield done


def data_runs(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield ``pieces`` without blocks of zeros as (offset, bytes), and an empty run at each piece's end."""
    offset, rest = 0, b""
    for piece in pieces:
        whole = rest + piece if rest else piece
        end = len(whole) - len(whole) % BLOCK_BYTES
        if not (end == _READ_BYTES and whole.startswith(_ZEROS)):
            for start, stop in _nonzero(whole, end):
                yield offset + start, whole[start:stop]
        offset, rest = offset + end, whole[end:]
        yield offset, b""
    if rest.strip(b"\0"):
        yield offset, rest


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the data ranges of an open file, between its holes, as (start, end)."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            start, end = at, size  # this file system has no holes
        yield start, min(end, size)
        at = end


def _nonzero(data: bytes, end: int) -> Iterator[tuple[int, int]]:
    start = None
    for at in range(0, end, BLOCK_BYTES):
        if data.startswith(_ZERO_BLOCK, at):  # compares in place; a slice would copy
            if start is not None:
                yield start, at
            start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, end


def _copy_some(source: int, target: int, at: int, count: int) -> int:
    if sys.platform == "linux":
        try:
            if copied := os.copy_file_range(source, target, count, at, at):
                return copied
        except OSError as error:
            if error.errno not in _ELSEWHERE_ONLY:
                raise
    data = os.pread(source, min(count, _READ_BYTES), at)
    write_at(target, data, at)
    return len(data)


def _fclonefileat(source: int, path: Path) -> int:
    """Clone ``source`` to ``path``, which does not exist; return 0 or the errno."""
    import ctypes

    call = _libc().fclonefileat
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
    call.restype = ctypes.c_int
    return 0 if call(source, _AT_FDCWD, os.fsencode(path), _CLONE_NOOWNERCOPY) == 0 else ctypes.get_errno()


def _libc() -> ctypes.CDLL:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)
