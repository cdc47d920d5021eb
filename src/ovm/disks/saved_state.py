"""A suspended machine's saved state, from the suspend to the start that resumes it.

``memory.suspended`` is what the hypervisor wrote; ``suspended.json`` tells which machine it was, with a CRC-32 of each
piece of the memory, and of itself. It is written last and removed first: a memory without it is nobody's. Of what
describes another machine by now, or is not what was written, nothing is ever loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ovm.paths import TargetPaths
from ovm.trust.atomic import TEMPORARY_PREFIX, NewFile, disk_errors, sync_directory, write_whole
from ovm.trust.files import read_file

FORMAT = 1
PIECE_BYTES = 4 * 1024 * 1024
RECORD_MAX_BYTES = 16 * 1024 * 1024

_PRIVATE = 0o600


class Unfit(Exception):
    """The saved state cannot be resumed; the text says why."""


class Suspended(msgspec.Struct, frozen=True, kw_only=True):
    """What ``suspended.json`` tells."""

    format: int = FORMAT
    at: float
    """When, in seconds since the epoch on the host's clock."""
    facts: dict[str, str]
    """What the machine was made of: its memory goes with nothing else."""
    ssh_port: int
    podman_port: int | None
    forwards: tuple[dict[str, str | int], ...]
    """What was open on the host, in the words of :class:`ovm.Forward`."""
    size: int
    """Bytes of the memory file."""
    pieces: tuple[int, ...]
    """The CRC-32 of each of its pieces."""


def is_there(target: TargetPaths) -> bool:
    """Return whether there is a saved state, valid or not."""
    return os.path.lexists(target.suspended)


def new_memory(target: TargetPaths) -> NewFile:
    """An empty file for a hypervisor to write to; it gets its name by :func:`keep`.

    Raises:
        FileError: it cannot be made.
    """
    with disk_errors(f"{target.memory} cannot be written"):
        return NewFile(target.directory, target.memory.name)


def keep(target: TargetPaths, memory: NewFile, **told: object) -> None:
    """Make ``memory`` and the record of it durable; ``told`` are the fields of :class:`Suspended` but the last two.

    Raises:
        FileError: it cannot be written.
        SpaceError: the file system is full.
    """
    with disk_errors(f"{target.memory} cannot be written"):
        size = os.fstat(memory.fd).st_size
        record = Suspended(size=size, pieces=tuple(_crcs(memory.fd)), **told)  # type: ignore[arg-type]
        memory.seal(_PRIVATE)
        memory.place(target.memory)
        sync_directory(target.directory)
        write_whole(target.suspended, encode(record), _PRIVATE)


def encode(record: Suspended) -> bytes:
    """A line of JSON, and one with its CRC-32."""
    line = msgspec.json.encode(record)
    return line + b"\n%08x\n" % _crc32(line)


def load(target: TargetPaths) -> Suspended:
    """The record.

    Raises:
        Unfit: it is not what was written, or of another version's.
    """
    try:
        line, end, crc = read_file(target.suspended, RECORD_MAX_BYTES).partition(b"\n")
    except OSError as error:
        raise Unfit(f"{target.suspended} cannot be read: {error.strerror}") from error
    if not end or crc != b"%08x\n" % _crc32(line):
        raise Unfit(f"{target.suspended} is damaged")
    try:
        record = msgspec.json.decode(line, type=Suspended)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unfit(f"{target.suspended} was written by another version of ovm") from error
    if record.format != FORMAT:
        raise Unfit(f"{target.suspended} was written by another version of ovm")
    return record


def open_memory(target: TargetPaths) -> int:
    """A descriptor of the memory.

    Raises:
        Unfit: it is not there.
    """
    try:
        return os.open(target.memory, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unfit(f"{target.memory} cannot be read: {error.strerror}") from error


def check_memory(fd: int, record: Suspended) -> None:
    """Compare every byte of the open memory with what was written.

    Raises:
        Unfit: it differs.
    """
    try:
        whole = os.fstat(fd).st_size == record.size and tuple(_crcs(fd)) == record.pieces
    except OSError as error:
        raise Unfit(f"the memory cannot be read: {error.strerror}") from error
    if not whole:
        raise Unfit("the memory is damaged")


def discard(target: TargetPaths) -> None:
    """Remove it all, the record first and for good: whatever runs now makes the memory that of another past.

    Raises:
        FileError: it cannot be removed.
    """
    with disk_errors(f"{target.suspended} cannot be removed"):
        if is_there(target):
            target.suspended.unlink()
            sync_directory(target.directory)
        for rest in (target.memory, target.directory / (TEMPORARY_PREFIX + target.memory.name)):
            rest.unlink(missing_ok=True)


def identity(path: Path) -> str:
    """Changes when another file lies there, or this one has been written to."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
    return "missing"


def _crcs(fd: int) -> Iterator[int]:
    at = 0
    while piece := os.pread(fd, PIECE_BYTES, at):
        yield _crc32(piece)
        at += len(piece)


def _crc32(data: bytes) -> int:
    from isal import isal_zlib

    crc: int = isal_zlib.crc32(data)
    return crc
