"""Verify that a machine's files are still as installed. Only reads; works while the machine runs, too."""

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
    """Result for one file."""

    name: str
    """Its key in ``versions``."""
    path: Path | None
    """``None`` where its name is not recorded."""
    state: State
    """``unknown``: it was installed without a recorded digest, or is being replaced now."""
    detail: str
    """The difference; empty if there is none."""


async def verify(target_dir: Path) -> list[FileState]:
    """Compare every file in ``target_dir`` with its recorded digest. Needs no lock.

    ``data.img`` is left out: it changes all the time, and its file system has its own checksums.
    """
    stop = Event()
    return await in_thread(partial(_verify, TargetPaths(target_dir), stop), stop)


def _verify(target: TargetPaths, stop: Event) -> list[FileState]:
    while True:
        recorded = records.load(target)
        found = [_state(name, target, recorded.made.get(name), stop.is_set) for name in recorded.versions]
        if stop.is_set() or records.load(target) == recorded:
            return found  # else files were replaced meanwhile, perhaps during the check


def _state(name: str, target: TargetPaths, made: Made | None, stopped: Callable[[], bool]) -> FileState:
    if made is None:
        return FileState(name, None, "unknown", "no recorded digest")
    path = target.directory / made.file
    if not plan.existing({name: path}):
        return FileState(name, path, "missing", "the file is missing")
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
        return "damaged", "its content has changed since it was installed"
    return "ok", ""
