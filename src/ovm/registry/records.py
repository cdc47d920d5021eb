"""The records that a service writes into the machine's directory: small JSON files, written atomically.

Read with the standard library alone, because the list of machines has to be fast.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ovm._version import __version__
from ovm.errors import OVMError
from ovm.process import identity
from ovm.text.printable import GuestText
from ovm.trust.atomic import disk_errors, write_whole
from ovm.trust.files import read_file

RECORD_MAX_BYTES = 1 << 20
LOG_TAIL_LINES = 100

_T = TypeVar("_T", bound="ServiceRecord | Ended")


@dataclass(frozen=True, kw_only=True)
class ServiceRecord:
    """Identity of a machine's service; exists from its start to its clean end."""

    pid: int
    started: int
    program: str
    version: str
    started_at: float
    boot_id: str
    socket_dir: str
    """Recorded, because the service may have been started with another ``$XDG_RUNTIME_DIR``."""

    def __post_init__(self) -> None:
        if "\0" in self.socket_dir:
            raise ValueError("a path cannot contain a NUL")

    @classmethod
    def ours(cls, socket_dir: Path) -> ServiceRecord:
        """Return the record of this process."""
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
    """How the last run of a service ended."""

    at: float
    """Time of the end, in seconds since the epoch."""
    reason: str
    """``stopped``, ``suspended``, ``powered-off`` or ``failed``."""
    code: str = ""
    """Code of the error."""
    message: str = ""
    """Message of the error: like the fields below made one printable line, whatever the file contains."""
    hint: str = ""
    stage: str = ""
    exit_reason: str = ""
    log_tail: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("message", "hint", "stage", "exit_reason"):
            object.__setattr__(self, name, str(GuestText(getattr(self, name))))
        object.__setattr__(self, "log_tail", [str(GuestText(str(line))) for line in self.log_tail[-LOG_TAIL_LINES:]])

    @classmethod
    def failed(cls, error: OVMError) -> Ended:
        """Return the record of a run that ends now with ``error``."""
        return cls(
            at=time.time(),
            reason="failed",
            code=error.code,
            message=error.message,
            hint=error.hint,
            stage=error.stage,
            exit_reason=error.exit_reason,
            log_tail=list(error.log_tail),
        )

    @property
    def error(self) -> dict[str, object] | None:
        """The error of the run, as :meth:`ovm.errors.OVMError.as_dict` returns it; ``None`` if it did not fail."""
        if self.reason != "failed":
            return None
        evidence: dict[str, object] = {
            "hint": self.hint,
            "stage": self.stage,
            "exit_reason": self.exit_reason,
            "log_tail": self.log_tail,
        }
        return {"code": self.code, "message": self.message} | {name: told for name, told in evidence.items() if told}


def save(path: Path, record: ServiceRecord | Ended) -> None:
    """Write a record atomically.

    Raises:
        FileError: it cannot be written.
        SpaceError: the file system is full.
    """
    with disk_errors(f"{path} cannot be written"):
        write_whole(path, json.dumps(asdict(record)).encode(), 0o600, durable=False)


def read(path: Path, kind: type[_T]) -> _T | None:
    """Read the record at ``path``; ``None`` if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        told: dict[str, Any] = json.loads(read_file(path, RECORD_MAX_BYTES))
        # type names, because annotations are strings in this file
        kinds = {one.name: str(one.type).partition("[")[0] for one in fields(kind)}
        return kind(**{name: value for name, value in told.items() if type(value).__name__ == kinds.get(name)})
    return None
