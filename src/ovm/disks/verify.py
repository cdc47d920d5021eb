"""Whether the files of a machine are still what they were when they were made. Only reads, also while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Literal

from ovm.disks import digest, plan, records
from ovm.disks.records import Made
from ovm.paths import TargetPaths
from ovm.process.threads import in_thread

State = Literal["ok", "damaged", "missing", "unknown"]


@dataclass(frozen=True, slots=True)
class FileState:
    """What became of one file."""

    name: str
    """Its key in ``versions``."""
    path: Path | None
    """``None`` where nothing says what it is called."""
    state: State
    """``unknown``: it was made without a record of its digest, or is only now being made."""
    detail: str
    """How it differs; empty if it does not."""


async def verify(target_dir: Path) -> list[FileState]:
    """Compare every file in ``target_dir`` with the digest it had when it was made. Needs no lock.

    ``data.img`` is not among them: it changes all the time, and its file system has sums of its own.
    """
    stop = Event()
    return await in_thread(partial(_verify, TargetPaths(target_dir), stop), stop)


def _verify(target: TargetPaths, stop: Event) -> list[FileState]:
    while True:
        recorded = records.load(target)
        found = [_state(name, target, recorded.made.get(name), stop.is_set) for name in recorded.versions]
        if stop.is_set() or records.load(target) == recorded:
            return found  # else files were replaced meanwhile, perhaps under our eyes


def _state(name: str, target: TargetPaths, made: Made | None, stopped: Callable[[], bool]) -> FileState:
    if made is None:
        return FileState(name, None, "unknown", "no digest of it is recorded")
    path = target.directory / made.file
    if not plan.existing({name: path}):
        return FileState(name, path, "missing", "it is gone")
    try:
        with path.open("rb") as opened:
            return FileState(name, path, *_compared(opened.fileno(), made, stopped))
    except OSError as error:
        return FileState(name, path, "damaged", f"it cannot be read: {error.strerror}")


def _compared(fd: int, made: Made, stopped: Callable[[], bool]) -> tuple[State, str]:
    size = os.fstat(fd).st_size
    if size != made.size:
        return "damaged", f"it has {size} bytes instead of {made.size}"
    found = digest.of_kind(made.digest)
    for piece in digest.read(fd):
        if stopped():
            break
        found.update(piece)
    if found.hexdigest() != made.digest.removeprefix(digest.PLAIN):
        return "damaged", "its content is not what it was when it was made"
    return "ok", ""
