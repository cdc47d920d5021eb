"""Logs of the last three starts: NAME.log is the newest, then NAME.2.log and NAME.3.log."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from ovm.paths import LOG_GENERATIONS
from ovm.text import printable

TAIL_LINES = 15
_TAIL_BYTES = 16 * 1024


def log_path(log_dir: Path, name: str, generation: int = 1) -> Path:
    """Where the log of ``name`` lies; generation 1 is the newest."""
    return log_dir / (f"{name}.log" if generation == 1 else f"{name}.{generation}.log")


def rotate(log_dir: Path, name: str) -> Path:
    """Make room for a new log of ``name`` and return its path; the file is there, empty and 0600."""
    for generation in range(LOG_GENERATIONS - 1, 0, -1):
        older = log_path(log_dir, name, generation)
        if older.exists():
            older.replace(log_path(log_dir, name, generation + 1))
    newest = log_path(log_dir, name)
    os.close(os.open(newest, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    return newest


def tail(path: Path, lines: int = TAIL_LINES, *, since: int = 0) -> tuple[str, ...]:
    """The last ``lines`` lines behind byte ``since``, made fit to print; empty where there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(since, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(printable(line).rstrip() for line in text.splitlines() if line.strip())[-lines:]


class Reader:
    """The last ``lines`` lines of the log at ``path``, then what is added to it, further starts' logs included.

    A context manager; raises :class:`OSError`.
    """

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        self._file = path.open("rb")
        last = deque(self._file, maxlen=lines)
        self._begun = last.pop() if last and not last[-1].endswith(b"\n") else b""
        self._untold = b"".join(last)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def more(self) -> list[str]:
        """The whole lines that were not told yet, made fit to print."""
        content = self._untold + self._begun + self._file.read()
        if not content and self._is_rotated():
            self._file.close()
            self._file = self._path.open("rb")
            content = self._file.read()
        whole, end, self._begun = content.rpartition(b"\n")
        self._untold = b""
        return _lines(whole) if end else []

    def rest(self) -> list[str]:
        """The line that is not whole yet, if there is one."""
        begun, self._begun = self._begun, b""
        return _lines(begun)

    def _is_rotated(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False


def _lines(content: bytes) -> list[str]:
    return [printable(line.rstrip("\r")) for line in content.decode(errors="replace").split("\n")] if content else []
