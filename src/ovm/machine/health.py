"""Health checks of a running machine: podman, the guest, and the data disk."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from ovm.errors import GuestError, OVMError
from ovm.machine.running import Session
from ovm.model.info import Health
from ovm.model.options import MIB, Options
from ovm.paths import TargetPaths
from ovm.process.threads import in_thread
from ovm.text.printable import GuestText

TIMEOUT_S = 10.0
"""Timeout for podman and for the guest, each."""
LOW_MIB = 256
"""Less free space than this, in the guest or on the host, is a health problem."""
ENOUGH_MIB = 32
"""Free space on the host at which a guest that was paused for lack of it resumes."""
NUMBER_MAX = 1 << 53
"""Largest number accepted in a guest's report: more bytes than any disk has, and exact in JSON."""
_SHOWN_BYTES = 100
_PROBLEMS_MAX = 20


@dataclass(frozen=True, slots=True)
class Look:
    """Result of one health check."""

    health: Health
    reachable: bool
    """Whether podman or the guest answered; if neither did, the network may be the cause."""


async def look(session: Session) -> Look:
    """Check podman through the user's socket, the guest over ssh, and the host's free space."""
    room = await in_thread(partial(_room, TargetPaths(session.options.target_dir).data_disk))
    found = Health(checked_at=time.time(), host_free_bytes=room.free_bytes)
    problems = [room.problem] if room.problem else []
    if not session.profile.engine:
        return Look(replace(found, problems=tuple(problems)), reachable=True)
    podman, guest = await asyncio.gather(_podman(session), _guest(session), return_exceptions=True)
    unreachable = [error for error in (podman, guest) if isinstance(error, OVMError)]
    for unexpected in (podman, guest):
        if isinstance(unexpected, BaseException) and not isinstance(unexpected, OVMError):
            raise unexpected
    problems += [error.message for error in unreachable]
    if isinstance(guest, Health):
        found = replace(guest, checked_at=found.checked_at, host_free_bytes=found.host_free_bytes)
        problems += guest.problems
    return Look(replace(found, problems=tuple(problems)), reachable=len(unreachable) < 2)


async def _podman(session: Session) -> None:
    await session.ping(timeout_s=TIMEOUT_S)


async def _guest(session: Session) -> Health:
    report = await session.profile.disk_report(session.ssh, timeout_s=TIMEOUT_S)
    return Health() if report is None else parse(report)


def parse(report: bytes) -> Health:
    """Parse the guest's report: a line about its data disk, then a line for each other problem.

    Raises:
        GuestError: the report is malformed.
    """
    disk, *others = report.splitlines() or [b""]
    try:
        size, free, mode, errors = disk.split()
        size_bytes, free_bytes, error_count = int(size), int(free), int(errors)
    except ValueError:
        raise _not_understood(report) from None
    if not all(0 <= number <= NUMBER_MAX for number in (size_bytes, free_bytes, error_count)):
        raise _not_understood(report)
    problems = []
    if mode == b"ro":
        problems.append("the data disk is read-only because of a file system error")
    if error_count:
        problems.append(f"the data disk has counted {error_count} errors")
    if size_bytes and free_bytes < LOW_MIB * MIB:
        problems.append(f"the data disk is almost full: {free_bytes // MIB} MiB are free")
    problems += [str(GuestText(line)) for line in others[:_PROBLEMS_MAX]]
    return Health(problems=tuple(problems), data_size_bytes=size_bytes or None, data_free_bytes=free_bytes or None)


def _not_understood(report: bytes) -> GuestError:
    return GuestError(f"the guest's report on its data disk is malformed: {report[:_SHOWN_BYTES]!r}")


async def has_room(options: Options) -> bool:
    """Return whether the host has enough space again to resume a guest that was paused for lack of it."""
    room = await in_thread(partial(_room, TargetPaths(options.target_dir).data_disk))
    return room.free_bytes is None or room.free_bytes >= ENOUGH_MIB * MIB


@dataclass(frozen=True, slots=True)
class _Room:
    free_bytes: int | None
    problem: str = ""


def _room(data_disk: Path) -> _Room:
    """Return the host's free space for the data disk to grow into."""
    try:
        there, disk = os.statvfs(data_disk.parent), data_disk.stat()
    except OSError as error:
        return _Room(None, f"cannot check {data_disk}: {error.strerror}")
    if not there.f_blocks:  # some network file systems do not report sizes
        return _Room(None)
    free, missing = there.f_bavail * there.f_frsize, disk.st_size - disk.st_blocks * 512
    if free >= min(LOW_MIB * MIB, missing):
        return _Room(free)
    return _Room(free, f"the host has {free // MIB} MiB left for {data_disk}, which may need {missing // MIB} MiB more")
