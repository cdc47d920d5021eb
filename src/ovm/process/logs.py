"""Logs of the last three starts: NAME.log is the newest, then NAME.2.log and NAME.3.log."""

from __future__ import annotations

import os
from pathlib import Path

from ovm.paths import LOG_GENERATIONS

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


def printable(text: str) -> str:
    """``text`` of untrusted origin without what could move a terminal's cursor or worse."""
    return "".join(c if c.isprintable() or c == "\t" else "·" for c in text)
