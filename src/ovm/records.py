"""What is written down in a machine's directory by its service: small JSON files, whole or not at all.

Read by the standard library alone: a list of machines is made of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ovm import __version__
from ovm.process import identity

RECORD_MAX_BYTES = 1 << 20

_T = TypeVar("_T", bound="ServiceRecord | Ended")


@dataclass(frozen=True, kw_only=True)
class ServiceRecord:
    """Who the service of a machine is; there from its start to its clean end."""

    pid: int
    started: int
    program: str
    version: str
    started_at: float
    boot_id: str
    socket_dir: str
    """Where it was started ``$XDG_RUNTIME_DIR`` may have been another one."""

    @classmethod
    def ours(cls, socket_dir: Path) -> ServiceRecord:
        """Of this process."""
        process = identity.of(os.getpid())
        return cls(
            pid=os.getpid(),
            started=process.started if process else 0,
            program=process.program if process else "",
            version=__version__,
            started_at=time.time(),
            boot_id=identity.boot(),
            socket_dir=str(socket_dir),
        )


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the last run of a service came to its end."""

    at: float
    """In seconds since the epoch."""
    reason: str
    """``stopped``, ``suspended``, ``powered-off`` or ``failed``."""
    code: str = ""
    """Of the error it failed of."""
    message: str = ""


def save(path: Path, record: ServiceRecord | Ended) -> None:
    """Write a record whole or not at all."""
    new = path.with_name(f".ovm-new.{path.name}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
        json.dump(asdict(record), file)
    new.replace(path)


def read(path: Path, kind: type[_T]) -> _T | None:
    """The record at ``path``; ``None`` if there is none, or one that is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        told: dict[str, Any] = json.loads(_content(path))
        kinds = {field.name: field.type for field in fields(kind)}  # by name, as annotations are in this file
        return kind(**{name: value for name, value in told.items() if type(value).__name__ == kinds.get(name)})
    return None


def _content(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(fd, RECORD_MAX_BYTES)
    finally:
        os.close(fd)
