"""The data disk, which is never replaced, and the record about it.

A guest may format a data disk only while machine.json records that it was never ready. So the record must be safe at
every instant: it says "never" only when no used disk exists any more.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from ovm.errors import FileError
from ovm.model.options import MIB
from ovm.paths import TargetPaths
from ovm.process.threads import in_thread
from ovm.trust.atomic import disk_errors, sync, sync_directory, sync_path, write_whole
from ovm.trust.files import read_file

MACHINE_MAX_BYTES = 16 << 10

_PRIVATE = 0o600
_NO_RECORD = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.EISDIR, errno.ENXIO})
"""Errors that mean: no record, or something else at its path."""
_BTRFS_MAGIC = b"_BHRfS_M"
_BTRFS_MAGIC_AT = 0x10040


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """State of a machine that outlives its processes."""

    machine_id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    data_ever_ready: bool = False
    """Whether the guest was ever ready with this data disk; if so, the disk must never be formatted."""
    data_device_size: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Last known size of the data disk."""


@dataclass(frozen=True, slots=True)
class DataDisk:
    """Result of ``ensure_data_disk``."""

    size_bytes: int
    """Actual size; may exceed the requested one, because the disk never shrinks."""
    created: bool = False
    grown: bool = False


def load_machine(target: TargetPaths) -> Machine:
    """Load machine.json.

    If it is missing or damaged, return a new identity, and treat the disk as used if it holds any data.
    ``save_machine`` or ``ensure_data_disk`` writes that.

    Raises:
        FileError: it exists and cannot be read.
    """
    try:
        return msgspec.json.decode(read_file(target.machine, MACHINE_MAX_BYTES), type=Machine)
    except OSError as error:
        if error.errno not in _NO_RECORD:  # it may be intact, and its identity must be kept
            raise FileError(f"{target.machine} cannot be read: {error.strerror}", hint="try again") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    return Machine(machine_id=uuid.uuid4().hex, data_ever_ready=_holds_anything(target.data_disk))


def save_machine(target: TargetPaths, machine: Machine) -> None:
    """Replace machine.json; durable on return.

    Raises:
        FileError: it cannot be written.
        SpaceError: the file system is full.
    """
    content = msgspec.json.format(msgspec.json.encode(machine), indent=2)
    with disk_errors(f"{target.machine} cannot be written"):
        write_whole(target.machine, content, _PRIVATE)


async def ensure_data_disk(target: TargetPaths, size_mib: int) -> DataDisk:
    """Create the data disk, sparse, or grow it to at least ``size_mib``. It never shrinks.

    Raises:
        FileError: it is not a regular file, cannot be used, or was truncated.
        SpaceError: the file system cannot hold a file of that size.
    """
    return await in_thread(partial(_ensure, target, size_mib * MIB))


async def remove_data(target: TargetPaths) -> None:
    """Delete the data disk with its content; the next one is empty and may be formatted.

    Raises:
        FileError: it cannot be removed.
    """
    await in_thread(partial(_remove, target))


def make_scratch_disk(target: TargetPaths, size_mib: int) -> None:
    """Replace the scratch disk with an empty sparse one.

    Raises:
        FileError: it cannot be created.
        SpaceError: the file system cannot hold a file of that size.
    """
    disk = target.scratch_disk
    with disk_errors(f"{disk} cannot be created"):
        disk.unlink(missing_ok=True)
        fd = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE)
        try:
            os.ftruncate(fd, size_mib * MIB)
        finally:
            os.close(fd)


def check_still_formatted(target: TargetPaths) -> None:
    """Reject a used data disk without a file system; a guest that formats such disks would format it.

    Raises:
        FileError: it has no file system, or cannot be read.
    """
    if not load_machine(target).data_ever_ready:
        return
    with disk_errors(f"{target.data_disk} cannot be read"), target.data_disk.open("rb") as disk:
        disk.seek(_BTRFS_MAGIC_AT)
        if disk.read(len(_BTRFS_MAGIC)) == _BTRFS_MAGIC:
            return
    raise FileError(
        f"{target.data_disk} no longer holds a btrfs file system; the guest would format it",
        hint="restore it, or start over with reset_path(data=True)",
    )


def _ensure(target: TargetPaths, wanted: int) -> DataDisk:
    disk = target.data_disk
    with disk_errors(f"{disk} cannot be used"):
        target.directory.mkdir(parents=True, exist_ok=True)
        machine = load_machine(target)
        created = not os.path.lexists(disk)
        if created:
            # its removal must be durable before the record allows formatting
            sync_directory(target.directory)
            machine = msgspec.structs.replace(machine, data_ever_ready=False, data_device_size=0)
            save_machine(target, machine)
        size = _grow(disk, wanted, machine.data_device_size, create=created)
    now = msgspec.structs.replace(machine, data_device_size=max(size, wanted))
    if now != machine:
        save_machine(target, now)
    return DataDisk(now.data_device_size, created=created, grown=not created and size < wanted)


def _grow(disk: Path, wanted: int, known: int, *, create: bool) -> int:
    """Grow the disk and return its old size. If a crash leaves it too short, the next run grows it."""
    if not create and not stat.S_ISREG(disk.stat().st_mode):
        raise FileError(f"{disk} is not a regular file", hint="move it away")
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
    fd = os.open(disk, flags, _PRIVATE)
    try:
        size = os.fstat(fd).st_size
        if size < known:
            raise FileError(
                f"{disk} was truncated from {known} to {size} bytes",
                hint="restore a complete copy, or reset the machine with its data",
            )
        if size < wanted:
            os.ftruncate(fd, wanted)
        if max(size, wanted) > known:  # a killed run may have grown it without syncing
            sync(fd)
    finally:
        os.close(fd)
    if not known:
        sync_path(disk.parent)
    return size


def _remove(target: TargetPaths) -> None:
    with disk_errors(f"{target.data_disk} cannot be removed"):
        target.data_disk.unlink(missing_ok=True)
        if target.directory.is_dir():
            sync_directory(target.directory)
    # only after the removal is durable: a record that allows formatting must never meet a used disk
    machine = load_machine(target)
    if machine.data_ever_ready or machine.data_device_size:
        save_machine(target, msgspec.structs.replace(machine, data_ever_ready=False, data_device_size=0))


def _holds_anything(disk: Path) -> bool:
    try:
        return disk.stat().st_blocks > 0
    except FileNotFoundError:
        return False
    except OSError:  # unknown, so assume that it does
        return True
