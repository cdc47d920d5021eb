"""Logs of the last three starts: NAME.log is the newest, then NAME.2.log and NAME.3.log.

A guest or a helper may write any amount, so logs are read in blocks, and a line is truncated after LINE_MAX_BYTES.
NULs at a line's beginning are skipped: a log that was truncated while its writer kept its offset has a hole there.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from ovm.paths import LOG_GENERATIONS
from ovm.text.printable import printable

TAIL_LINES = 15
SIZE_MAX_BYTES = 16 * 1024 * 1024
"""A log larger than this is truncated while it is written."""
KEPT_BYTES = 256 * 1024
"""Size of its end that is kept then."""
LINE_MAX_BYTES = 8 * 1024
"""Longest part of a line that is shown."""
LOOKED_THROUGH_MAX_BYTES = 2 * SIZE_MAX_BYTES
"""Size of a log's end that is searched for the last lines."""
LINE_CUT = " … (cut)"
_CUT = b"[ovm: this log was too large; all above its last %d KiB was removed]\n" % (KEPT_BYTES // 1024)
_TAIL_BYTES = 16 * 1024
_BLOCK_BYTES = 64 * 1024
_SECTOR_BYTES = 512
"""The unit of ``st_blocks``, on every file system."""


def log_path(log_dir: Path, name: str, generation: int = 1) -> Path:
    """Return the path of the log of ``name``; generation 1 is the newest."""
    return log_dir / (f"{name}.log" if generation == 1 else f"{name}.{generation}.log")


def rotate(log_dir: Path, name: str) -> Path:
    """Rename the older logs of ``name`` and create an empty new one with mode 0600; return its path."""
    for generation in range(LOG_GENERATIONS - 1, 0, -1):
        older = log_path(log_dir, name, generation)
        if older.exists():
            older.replace(log_path(log_dir, name, generation + 1))
    newest = log_path(log_dir, name)
    os.close(os.open(newest, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    return newest


def cut(path: Path) -> bool:
    """Truncate the log at ``path``, in place, to its end, if it takes more than SIZE_MAX_BYTES on the disk.

    A writer that appends continues after the kept end; any other at its own offset, with a hole before it. What is
    written during the truncation may be lost. Return whether it was truncated; a missing log is no error.

    Raises:
        OSError: it cannot be written.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with os.fdopen(fd, "rb+", buffering=0) as file:
        status = os.fstat(fd)
        if status.st_blocks * _SECTOR_BYTES <= SIZE_MAX_BYTES:
            return False
        file.seek(max(0, status.st_size - KEPT_BYTES))
        kept = file.read(KEPT_BYTES) or b""
        file.seek(0)
        file.truncate(file.write(_CUT + kept[kept.find(b"\n") + 1 :]))
    return True


def tail(path: Path, lines: int = TAIL_LINES, *, since: int = 0) -> tuple[str, ...]:
    """Return the last ``lines`` lines after byte ``since``, printable; empty if there is no such file.

    If the log was truncated and is now shorter than ``since``, all of it counts as after ``since``.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since if since <= size else 0, size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ()
    found = (line.lstrip("\0") for line in text.splitlines())
    return tuple(printable(line).rstrip() for line in found if line.strip())[-lines:]


class Reader:
    """The last ``lines`` lines of the log at ``path``, then what is added to it, further starts' logs included.

    A context manager; raises :class:`OSError`.
    """

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._begun = b""
        self._begun_is_cut = False
        self._file.seek(_last_lines(self._file, lines))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def more(self) -> list[str]:
        """Return some of the complete lines not returned yet, printable; empty if there are none now."""
        while True:
            block = self._file.read(_BLOCK_BYTES)
            if not block:
                if not self._goes_on_elsewhere():
                    return []
                if self._begun:
                    return self.rest()
                continue
            whole, end, begun = block.rpartition(b"\n")
            lines = [self._finished(line) for line in whole.split(b"\n")] if end else []
            self._begin(begun)
            if lines:
                return lines

    def rest(self) -> list[str]:
        """Return the incomplete line, if there is one."""
        return [self._finished(b"")] if self._begun else []

    def _begin(self, piece: bytes) -> None:
        self._begun += piece if self._begun else piece.lstrip(b"\0")
        self._begun_is_cut |= len(self._begun) > LINE_MAX_BYTES
        self._begun = self._begun[:LINE_MAX_BYTES]

    def _finished(self, piece: bytes) -> str:
        self._begin(piece)
        line = printable(self._begun.decode(errors="replace").rstrip("\r"))
        line += LINE_CUT if self._begun_is_cut else ""
        self._begun, self._begun_is_cut = b"", False
        return line

    def _goes_on_elsewhere(self) -> bool:
        """At the end of the file, return whether it was replaced or truncated; then the reader is at its beginning."""
        try:
            here, there = os.fstat(self._file.fileno()), self._path.stat()
        except FileNotFoundError:
            return False
        if os.path.samestat(here, there):
            if here.st_size >= self._file.tell():
                return False
            self._file.seek(0)
            return True
        self._file.close()
        self._file = self._path.open("rb", buffering=0)
        return True


def _last_lines(file: BinaryIO, lines: int) -> int:
    """Return the offset of the last ``lines`` lines of ``file``; the last may be incomplete."""
    end = file.seek(0, os.SEEK_END)
    oldest = max(0, end - LOOKED_THROUGH_MAX_BYTES)
    wanted = lines + 1  # the newline before them
    at = end
    while at > oldest:
        begin = max(oldest, at - _BLOCK_BYTES)
        file.seek(begin)
        block = file.read(at - begin)
        if at == end and not block.endswith(b"\n"):
            wanted -= 1
        found = block.count(b"\n")
        if found >= wanted:
            place = len(block)
            for _ in range(wanted):
                place = block.rindex(b"\n", 0, place)
            return begin + place + 1
        wanted -= found
        at = begin
    return oldest
