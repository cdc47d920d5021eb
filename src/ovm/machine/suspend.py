"""A machine's saved state: what is recorded with it, when it matches, and how a start resumes it.

A saved state matches only the data disk as it was when the state was saved. So the record has a digest or identity of
everything the machine used, and the state is deleted before anything runs on that disk again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping

import msgspec

from ovm.disks import saved_state
from ovm.disks.saved_state import Suspended, Unfit
from ovm.errors import GuestError, OVMError, SpaceError, UnsupportedError
from ovm.hypervisors import VMSpec
from ovm.machine import instructions, prepare
from ovm.machine.running import Session
from ovm.model.ports import Forward
from ovm.paths import TargetPaths
from ovm.process.threads import in_thread
from ovm.trust.atomic import NewFile

log = logging.getLogger(__name__)

SYNC_TIMEOUT_S = 20.0
NO_ROOM_BYTES = 8 * 1024 * 1024
"""A disk with no more than that left counts as full when the state could not be written to it."""

DATA_DISK = "the data disk"
_TOLD_ANEW = frozenset({"blocked-host-ports", "channel-key", "format-data"})
"""Parts of the boot configuration that a resumed guest gets in another way, or does not need."""
_SUPERBLOCK = slice(64 * 1024, 68 * 1024)
"""Position of the btrfs superblock, which changes with every transaction."""


def check(prepared: prepare.Prepared) -> None:
    """Refuse a machine that cannot be suspended.

    Raises:
        UnsupportedError: the machine cannot be suspended; says why.
    """
    if not prepared.driver.can_suspend:
        raise UnsupportedError(
            "vfkit cannot suspend a machine: it does not offer this function of Apple's framework (crc-org/vfkit#449)",
            hint="pause or stop the machine",
        )
    if mounts := prepared.options.mounts:
        folders = ", ".join(str(mount.host_path) for mount in mounts)
        raise UnsupportedError(
            f"a machine that shares a folder ({folders}) cannot be suspended: the state of virtiofsd cannot be saved",
            hint="pause or stop the machine, or remove its mounts",
        )


def facts(prepared: prepare.Prepared, spec: VMSpec) -> dict[str, str]:
    """Return the facts that a saved state must match, by name, except the data disk; reads files.

    Raises:
        FileError: a file of the machine cannot be read.
    """
    if not prepared.driver.can_suspend or spec.shares:
        return {}
    files = prepared.files
    told = instructions.boot_config(prepared.options, channel_key="").files()
    return {
        "the virtual machine": _digest(prepared.driver.identity(spec).encode()),
        "the kernel": saved_state.identity(files.kernel),
        "the initrd": saved_state.identity(files.initrd),
        "the rootfs": saved_state.identity(files.rootfs),
        **{f"the boot configuration ({name})": _digest(told[name]) for name in sorted(told.keys() - _TOLD_ANEW)},
    }


def _disk(target: TargetPaths) -> dict[str, str]:
    with contextlib.suppress(OSError), target.data_disk.open("rb") as disk:
        disk.seek(_SUPERBLOCK.start)
        superblock = disk.read(_SUPERBLOCK.stop - _SUPERBLOCK.start)
        return {DATA_DISK: f"{saved_state.identity(target.data_disk)} {_digest(superblock)}"}
    return {DATA_DISK: "missing"}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _compare(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        raise Unfit(f"changed since it was suspended: {', '.join(changed)}")


class Recall:
    """The saved state that a start resumes, until it is given up."""

    def __init__(self, *, wanted: bool, given_up: Callable[[str], object]) -> None:
        self._wanted = wanted
        self._given_up = given_up
        self._checking: asyncio.Task[None] | None = None
        self._fd = -1
        self._target: TargetPaths | None = None
        self.record: Suspended | None = None

    async def look(self, target: TargetPaths, now: Mapping[str, str]) -> None:
        """Take the saved state if it matches ``now``, and let a thread verify all of it; otherwise delete it.

        The caller holds the directory's lock.

        Raises:
            FileError: the saved state cannot be deleted.
        """
        self._target = target
        if not self._wanted or not await in_thread(lambda: saved_state.is_there(target)):
            await in_thread(lambda: saved_state.discard(target))
            return
        try:
            record, fd = await in_thread(lambda: _take(target, now))
        except Unfit as unfit:
            await self.give_up(str(unfit))
            return
        self.record, self._fd = record, fd
        self._checking = asyncio.create_task(in_thread(lambda: saved_state.check_memory(fd, record)))

    @property
    def ssh_port(self) -> int | None:
        """The host port of sshd that the guest's firewall blocks."""
        return self.record.ssh_port if self.record else None

    @property
    def podman_port(self) -> int | None:
        """The host port of podman that the guest's firewall blocks."""
        return self.record.podman_port if self.record else None

    @property
    def forwards(self) -> tuple[Forward, ...]:
        """The forwards that were open on the host."""
        return tuple(msgspec.convert(f, Forward) for f in self.record.forwards) if self.record else ()

    async def is_whole(self) -> bool:
        """Return whether there is a saved state, verified to the last byte."""
        if self.record is not None and self._checking is not None:
            try:
                await asyncio.shield(self._checking)
            except Unfit as unfit:
                await self.give_up(str(unfit))
        return self.record is not None

    async def load(self, session: Session, *, timeout_s: float) -> None:
        """Load the saved state into the waiting guest, and delete it before the guest runs and changes the disk.

        Raises:
            OVMError: the hypervisor could not load it.
        """
        assert self._target is not None
        await session.vm.load(self._fd, timeout_s=timeout_s)
        await in_thread(lambda target=self._target: saved_state.discard(target))  # type: ignore[misc]

    async def give_up(self, why: str) -> None:
        """Delete the saved state, and report why."""
        assert self._target is not None
        log.warning("could not resume (%s); booting instead", why)
        self.record = None
        await in_thread(lambda target=self._target: saved_state.discard(target))  # type: ignore[misc]
        self._given_up(why)

    async def close(self) -> None:
        """Close the file."""
        if self._checking is not None:
            await asyncio.wait({self._checking})
            self._checking.exception()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _take(target: TargetPaths, now: Mapping[str, str]) -> tuple[Suspended, int]:
    record = saved_state.load(target)
    _compare(record.facts, {**now, **_disk(target)})
    try:
        for forward in record.forwards:
            msgspec.convert(forward, Forward)
    except msgspec.ValidationError as error:
        raise Unfit(f"{target.suspended} was written by another version of ovm") from error
    return record, saved_state.open_memory(target)


async def save(session: Session, *, runs: bool, timeout_s: float) -> None:
    """Save the guest's state, which pauses it. After a failure nothing is saved, and a guest that ran runs again.

    Raises:
        SpaceError: the disk has no room for the saved state.
        FileError: the saved state cannot be written.
        GuestError: the hypervisor could not save the state.
        HelperExited: the hypervisor ended.
    """
    target = TargetPaths(session.options.target_dir)
    if runs and session.profile.engine:
        await _sync(session)
    # before the state is saved: the resumed guest would keep dead connections, which block new ones
    await session.clock.close()
    await session.ssh.close()
    opened: list[NewFile] = []  # a list: the thread may open the file while this task is being cancelled
    try:
        await in_thread(lambda: opened.append(saved_state.new_memory(target)))
        (memory,) = opened
        await session.vm.save(memory.fd, timeout_s=timeout_s)
        await in_thread(lambda: _keep(session, target, memory))
    except BaseException as error:
        # before the guest runs again and changes the disk that the saved state belongs to
        full = await in_thread(lambda: _give_up(target, opened))
        if runs and session.vm.child.running:
            with contextlib.suppress(OVMError):
                await session.vm.resume()
        if full and isinstance(error, GuestError):
            raise SpaceError(
                f"the disk with {target.directory} has no room for the machine's saved state",
                hint=f"make room for up to {session.options.memory_mib} MiB",
            ) from error
        raise


async def _sync(session: Session) -> None:
    """Sync the guest's file systems, in case the saved state is lost."""
    try:
        await session.ssh.exec(["sync"], timeout_s=SYNC_TIMEOUT_S)
    except OVMError as error:
        log.warning("could not sync the guest's file systems before its state is saved: %s", error.message)


def _keep(session: Session, target: TargetPaths, memory: NewFile) -> None:
    saved_state.keep(
        target,
        memory,
        at=time.time(),
        facts={**session.facts, **_disk(target)},
        ssh_port=session.ssh.port,
        podman_port=session.podman_port,
        forwards=tuple(msgspec.to_builtins(forward) for forward in session.forwards.values()),
    )


def _give_up(target: TargetPaths, opened: list[NewFile]) -> bool:
    """Delete what was written; return whether the disk was full. One call, so that a cancel cannot interrupt it."""
    room = os.statvfs(target.directory)
    for memory in opened:
        memory.discard()
    saved_state.discard(target)
    return room.f_bavail * room.f_frsize <= NO_ROOM_BYTES
