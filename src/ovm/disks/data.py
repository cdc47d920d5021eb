"""The data disk, which is never replaced, and what must be remembered about it.

A data disk may be formatted only while machine.json says that it was never ready, so the record is kept on
the careful side of the disk at every instant: it says "never" only once no used disk is there any more.
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
"""There is none, or what lies there is no record."""
_BTRFS_MAGIC = b"_BHRfS_M"
_BTRFS_MAGIC_AT = 0x10040


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What must outlive the processes of a machine."""

    machine_id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    data_ever_ready: bool = False
    """Whether the guest was ever ready with this data disk: if so, it must never be formatted."""
    data_device_size: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Bytes the data disk had when last seen."""


@dataclass(frozen=True, slots=True)
class DataDisk:
    """What ``ensure_data_disk`` found or made."""

    size_bytes: int
    """The real size: larger than asked for if the disk was, because it never shrinks."""
    created: bool = False
    grown: bool = False


def load_machine(target: TargetPaths) -> Machine:
    """What machine.json says.

    If it is missing or damaged: a new identity, and the disk counts as used if it holds anything. That
    is kept by ``save_machine`` or ``ensure_data_disk``.

    Raises:
        FileError: it is there and cannot be read.
    """
    try:
        return msgspec.json.decode(read_file(target.machine, MACHINE_MAX_BYTES), type=Machine)
    except OSError as error:
        if error.errno not in _NO_RECORD:  # it may be whole, and the identity in it is to be kept
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
    """Make the data disk be there, sparse and of at least ``size_mib``. An existing one only ever grows.

    Raises:
        FileError: it is no regular file, cannot be used, or somebody has cut it.
        SpaceError: the file system cannot hold a file of that size.
    """
    return await in_thread(partial(_ensure, target, size_mib * MIB))


async def remove_data(target: TargetPaths) -> None:
    """Remove the data disk and all that is in it; the next one will be empty and may be formatted.

    Raises:
        FileError: it cannot be removed.
    """
    await in_thread(partial(_remove, target))


def make_scratch_disk(target: TargetPaths, size_mib: int) -> None:
    """An empty sparse disk in place of whatever scratch disk was there.

    Raises:
        FileError: it cannot be made.
        SpaceError: the file system cannot hold a file of that size.
    """
    disk = target.scratch_disk
    with disk_errors(f"{disk} cannot be made"):
        disk.unlink(missing_ok=True)
        fd = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE)
        try:
            os.ftruncate(fd, size_mib * MIB)
        finally:
            os.close(fd)


def check_still_formatted(target: TargetPaths) -> None:
    """Refuse a data disk that was in use and carries no file system any more, where the guest would make a new one.

    Raises:
        FileError: it has none, or cannot be read.
    """
    if not load_machine(target).data_ever_ready:
        return
    with disk_errors(f"{target.data_disk} cannot be read"), target.data_disk.open("rb") as disk:
        disk.seek(_BTRFS_MAGIC_AT)
        if disk.read(len(_BTRFS_MAGIC)) == _BTRFS_MAGIC:
            return
    raise FileError(
        f"{target.data_disk} carries no btrfs any more; the guest would format it",
        hint="put it back, or start over with reset_path(data=True)",
    )


def _ensure(target: TargetPaths, wanted: int) -> DataDisk:
    disk = target.data_disk
    with disk_errors(f"{disk} cannot be used"):
        target.directory.mkdir(parents=True, exist_ok=True)
        machine = load_machine(target)
        created = not os.path.lexists(disk)
        if created:
            sync_directory(target.directory)  # whoever removed it may not have seen to that
            machine = msgspec.structs.replace(machine, data_ever_ready=False, data_device_size=0)
            save_machine(target, machine)
        size = _grow(disk, wanted, machine.data_device_size, create=created)
    now = msgspec.structs.replace(machine, data_device_size=max(size, wanted))
    if now != machine:
        save_machine(target, now)
    return DataDisk(now.data_device_size, created=created, grown=not created and size < wanted)


def _grow(disk: Path, wanted: int, known: int, *, create: bool) -> int:
    """The size before. A file that a crash left too short is merely grown by the next run."""
    if not create and not stat.S_ISREG(disk.stat().st_mode):
        raise FileError(f"{disk} is not a regular file", hint="move it away")
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
    fd = os.open(disk, flags, _PRIVATE)
    try:
        size = os.fstat(fd).st_size
        if size < known:
            raise FileError(
                f"{disk} has been cut from {known} to {size} bytes",
                hint="put a whole copy back, or reset the machine with its data",
            )
        if size < wanted:
            os.ftruncate(fd, wanted)
        if max(size, wanted) > known:  # a run that was killed may have grown it and not come to this
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
    # only now: a used disk must not meet a record that allows formatting it
    machine = load_machine(target)
    if machine.data_ever_ready or machine.data_device_size:
        save_machine(target, msgspec.structs.replace(machine, data_ever_ready=False, data_device_size=0))


def _holds_anything(disk: Path) -> bool:
    try:
        return disk.stat().st_blocks > 0
    except FileNotFoundError:
        return False
    except OSError:  # it cannot be looked at, so it may
        return True
