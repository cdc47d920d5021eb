"""The saved state of a suspended machine, until the start that resumes it.

The hypervisor writes ``memory.suspended``. The record, ``suspended.json``, identifies the machine and holds a CRC-32 of
each piece of the saved state and of itself. It is written last and deleted first: without it, a saved state is invalid.
A saved state that is damaged or no longer matches the machine is never loaded.
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
    """The machine cannot resume from its saved state; the message is the reason."""


class Suspended(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``suspended.json``."""

    format: int = FORMAT
    at: float
    """Time of the suspend: seconds since the epoch on the host's clock."""
    facts: dict[str, str]
    """Identity of the machine's parts; the saved state matches no others."""
    ssh_port: int
    podman_port: int | None
    forwards: tuple[dict[str, str | int], ...]
    """Open forwards, with the fields of :class:`ovm.Forward`."""
    size: int
    """Size of the saved state in bytes."""
    pieces: tuple[int, ...]
    """CRC-32 of each piece of the saved state."""


def is_there(target: TargetPaths) -> bool:
    """Return whether a saved state exists, valid or not."""
    return os.path.lexists(target.suspended)


def new_memory(target: TargetPaths) -> NewFile:
    """Create an empty file for the hypervisor to write to; :func:`keep` gives it its final name.

    Raises:
        FileError: it cannot be created.
    """
    with disk_errors(f"{target.memory} cannot be written"):
        return NewFile(target.directory, target.memory.name)


def keep(target: TargetPaths, memory: NewFile, **told: object) -> None:
    """Make ``memory`` and its record durable; ``told`` are the fields of :class:`Suspended` except the last two.

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
    """Encode the record as a line of JSON and a line with its CRC-32."""
    line = msgspec.json.encode(record)
    return line + b"\n%08x\n" % _crc32(line)


def load(target: TargetPaths) -> Suspended:
    """Load the record.

    Raises:
        Unfit: it is damaged, unreadable, or from another version of ovm.
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
    """Open the saved state and return its descriptor.

    Raises:
        Unfit: it cannot be opened.
    """
    try:
        return os.open(target.memory, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unfit(f"{target.memory} cannot be read: {error.strerror}") from error


def check_memory(fd: int, record: Suspended) -> None:
    """Check every byte of the open saved state against the record.

    Raises:
        Unfit: it is damaged or unreadable.
    """
    try:
        whole = os.fstat(fd).st_size == record.size and tuple(_crcs(fd)) == record.pieces
    except OSError as error:
        raise Unfit(f"the saved state cannot be read: {error.strerror}") from error
    if not whole:
        raise Unfit("the saved state is damaged")


def discard(target: TargetPaths) -> None:
    """Delete the saved state. The record goes first, durably: a machine that runs invalidates the saved state.

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
    """Return a text that changes when the file is replaced or written to."""
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
