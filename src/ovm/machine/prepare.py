"""Preparation of a machine: check inputs, then create files, keys and disks."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from ovm import hypervisors, paths
from ovm.disks import data, saved_state
from ovm.disks import install as install_files
from ovm.disks import plan as origins
from ovm.disks.kernel import find_packed
from ovm.errors import FileError, HelperError, UnsupportedError
from ovm.guest import ssh
from ovm.host import environment
from ovm.hypervisors import Driver, accel, vfkit
from ovm.hypervisors.qemu import QEMUDriver
from ovm.hypervisors.virtiofsd import Virtiofsd
from ovm.machine import instructions
from ovm.machine.profiles import PROFILES
from ovm.model.options import Options
from ovm.paths import KeyPaths, TargetPaths
from ovm.process import lock
from ovm.process.probe import GVPROXY, QEMU, VFKIT, VIRTIOFSD, check_helper, show_version
from ovm.process.threads import in_thread
from ovm.trust import directories

if TYPE_CHECKING:
    from ovm.host.programs import Helper

PREPARE_LOCK_WAIT_S = 60.0
"""Time to wait for another create on the same directory; for a running machine the wait is shorter."""

Progress = Callable[[str, int, int], object]
Hypervisor = Literal["qemu", "vfkit"]


class Choice(Protocol):
    """A hypervisor that has passed its checks."""

    async def driver(self, files: install_files.Files) -> Driver:
        """Return the driver for the installed ``files``.

        Raises:
            UnsupportedError: the requested accelerator does not work with this kernel.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The checked inputs of a machine, before anything is created."""

    options: Options
    """As given, and with the helpers that were found."""
    choice: Choice


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A start's inputs, which it does not change."""

    options: Options
    """As given, and with the helpers that were found."""
    files: install_files.Files
    driver: Driver


def locked_directories(options: Options) -> list[Path]:
    """Return the directories that belong to one machine only."""
    return [options.target_dir, options.socket_dir, options.log_dir]


async def choose(options: Options, hypervisor: Hypervisor) -> Plan:
    """Check every input and choose the hypervisor. Changes nothing, except that it caches the result of a KVM probe.

    :func:`install` raises what only the owner of the directories can detect: another owner, a full disk, damage to
    the data disk or inside an archive.

    Raises:
        InputError: an option or file cannot be used.
    """
    return await _CHOICES[hypervisor](options)


async def install(plan: Plan, progress: Progress | None = None) -> Prepared:
    """Create the machine's files, keys and disks.

    Raises:
        InputError: an option or file cannot be used; no file of the machine was replaced.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small.
    """
    files = await _make_all(plan.options, progress)
    return Prepared(options=plan.options, files=files, driver=await plan.choice.driver(files))


async def _choose_qemu(options: Options) -> Plan:
    PROFILES[options.guest].check_hypervisor(vsock=QEMUDriver.vsock)
    if options.rosetta:
        raise UnsupportedError("rosetta requires vfkit on macOS", hint="remove the option rosetta")
    arch = hypervisors.host_arch()
    await asyncio.to_thread(paths.check_socket_paths, options.socket_dir)
    options = await with_helpers(options, "gvproxy")
    await asyncio.to_thread(_check, options, arch)
    emulator, virtiofsd = await _check_emulator(options, arch)
    given = options.origin_path.kernel
    packed = arch == "aarch64" and await asyncio.to_thread(find_packed, given) is not None
    answer = None if packed else await _accelerator(options, emulator, given)
    return Plan(options=options, choice=_QEMUChoice(options, emulator, virtiofsd, answer))


async def _choose_vfkit(options: Options) -> Plan:
    from ovm.hypervisors import macos

    PROFILES[options.guest].check_hypervisor(vsock=vfkit.VfkitDriver.vsock)
    if sys.platform == "darwin":
        macos.check_host(macos.this_host(), rosetta=options.rosetta)
    arch = hypervisors.host_arch()
    if options.accelerator not in {"auto", "hvf"}:
        raise UnsupportedError(f"accelerator {options.accelerator} does not exist on macOS", hint="use auto or hvf")
    await asyncio.to_thread(paths.check_socket_paths, options.socket_dir, vfkit.LOCAL_SOCKET_LONGEST)
    shared = [mount.host_path for mount in options.mounts]
    vfkit.check_paths(
        [options.target_dir / options.origin_path.rootfs.name, options.log_dir, *shared], options.socket_dir
    )
    options = await with_helpers(options, "gvproxy", "vfkit")
    await asyncio.to_thread(_check, options, arch)
    program, gvproxy = options.origin_path.vfkit, options.origin_path.gvproxy
    assert program is not None
    assert gvproxy is not None
    version = show_version(await check_helper(program, VFKIT))
    await macos.preflight(
        program, gvproxy, options.origin_path.kernel, rosetta=options.rosetta, cmdline=options.kernel_cmdline
    )
    return Plan(options=options, choice=_VfkitChoice(version, arch))


_CHOICES: dict[Hypervisor, Callable[[Options], Awaitable[Plan]]] = {"qemu": _choose_qemu, "vfkit": _choose_vfkit}


@dataclass(frozen=True, slots=True)
class _QEMUChoice:
    options: Options
    emulator: accel.Emulator
    virtiofsd: Virtiofsd | None
    answer: accel.Answer | None
    """``None`` for a compressed kernel: QEMU can try it only after it is unpacked."""

    async def driver(self, files: install_files.Files) -> Driver:
        """Return the driver for the chosen QEMU."""
        answer = self.answer or await _accelerator(self.options, self.emulator, files.kernel)
        return QEMUDriver(emulator=self.emulator, answer=answer, virtiofsd=self.virtiofsd)


@dataclass(frozen=True, slots=True)
class _VfkitChoice:
    version: str
    arch: hypervisors.Arch

    async def driver(self, files: install_files.Files) -> Driver:
        """Return the driver for the installed vfkit."""
        assert files.vfkit is not None
        return vfkit.VfkitDriver(program=files.vfkit, version=self.version, arch=self.arch)


async def _accelerator(options: Options, emulator: accel.Emulator, kernel: Path) -> accel.Answer:
    return await accel.choose(options.accelerator, emulator, kernel=kernel, cache_dir=paths.cache_dir())


async def with_helpers(options: Options, *names: str) -> Options:
    """Return ``options``, completed with the installed helpers of these names.

    Raises:
        HelperError: a helper is missing or unsuitable.
    """
    from ovm.host import programs

    find = {"gvproxy": programs.find_gvproxy, "vfkit": programs.find_vfkit}
    found = {name: await find[name]() for name in names if getattr(options.origin_path, name) is None}
    if options.origin_path.gvproxy is not None:
        await check_helper(options.origin_path.gvproxy, GVPROXY)
    if not found:
        return options
    versions = {name: await asyncio.to_thread(_identity, helper) for name, helper in found.items()}
    return dataclasses.replace(
        options,
        origin_path=dataclasses.replace(options.origin_path, **{name: h.path for name, h in found.items()}),
        versions=dataclasses.replace(options.versions, **versions),
    )


def _identity(helper: Helper) -> str:
    """Return a version string that changes when the program file is replaced."""
    status = helper.path.stat()
    return f"{show_version(helper.version)} {status.st_size} {status.st_mtime_ns}"


async def _make_all(options: Options, progress: Progress | None) -> install_files.Files:
    await in_thread(partial(make_directories, options))
    # several machines may share the keys, so their directory is locked only while the keys are created
    alone = [*locked_directories(options), options.ssh_key_dir]
    async with lock.hold(alone, wait_s=PREPARE_LOCK_WAIT_S, brief=True), asyncio.TaskGroup() as tasks:
        files = tasks.create_task(_make_files(options, progress))
        tasks.create_task(in_thread(partial(ssh.make_keys, KeyPaths(options.ssh_key_dir))))
    return files.result()


async def _make_files(
    options: Options, progress: Progress | None = None, *, force: bool = False, without_data: bool = False
) -> install_files.Files:
    """Create files, then disks. Not in parallel: both delete partial files that a dead run left in the directory."""
    target = TargetPaths(options.target_dir)
    files = await install_files.prepare(
        options.origin_path,
        options.versions,
        options.target_dir,
        sha256=options.sha256,
        force=force,
        progress=progress,
    )
    if without_data:
        await data.remove_data(target)
    await data.ensure_data_disk(target, options.data_disk_mib)
    return files


def _check(options: Options, arch: hypervisors.Arch) -> None:
    origins.check_origins(options.origin_path, arch=arch, rootfs_must_be_btrfs=PROFILES[options.guest].rootfs_is_btrfs)
    origins.check_directories(
        {name: getattr(options, name) for name in ("target_dir", "socket_dir", "log_dir", "ssh_key_dir")}
    )
    for mount in options.mounts:
        if not mount.host_path.is_dir():
            raise FileError(f"mounts: {mount.host_path} is not a directory", hint="share a folder")
    for certificate in options.ca_certificates:
        if b"-----BEGIN CERTIFICATE-----" not in instructions.content(certificate):
            raise FileError(f"ca_certificates: {certificate} is not a PEM certificate")
    PROFILES[options.guest].check_options(options)
    if options.ssh_agent:
        environment.ssh_agent()


async def _check_emulator(options: Options, arch: hypervisors.Arch) -> tuple[accel.Emulator, Virtiofsd | None]:
    from ovm.host import programs

    if options.qemu:
        emulator = accel.Emulator(program=options.qemu, version=await check_helper(options.qemu, QEMU), arch=arch)
    else:
        found = await programs.find_qemu(arch)
        emulator = accel.Emulator(program=found.path, version=found.version, arch=arch)
    if not options.mounts:
        return emulator, None
    if options.virtiofsd:
        virtiofsd = Virtiofsd(options.virtiofsd, await check_helper(options.virtiofsd, VIRTIOFSD))
    else:
        found = await programs.find_virtiofsd()
        virtiofsd = Virtiofsd(found.path, found.version)
    if virtiofsd.is_c and os.geteuid() != 0:
        raise HelperError(
            f"{virtiofsd.program} shares folders for root only",
            hint="install the newer virtiofsd (a separate package since Debian 13), or start without mounts",
        )
    return emulator, virtiofsd


def check_files(files: install_files.Files) -> None:
    """Check that no installed file was deleted since.

    Raises:
        FileError: a file is missing; names it.
    """
    for path in (files.gvproxy, files.kernel, files.initrd, files.rootfs, files.vfkit):
        if path is not None and not path.is_file():
            raise FileError(f"{path} is missing", hint="restore the files with reset_path()")


def make_directories(options: Options) -> None:
    """Create the four directories; those of sockets and keys are private to this user.

    Raises:
        FileError: a directory cannot be created.
        UntrustedError: another user created a directory, or could change it.
    """
    for directory in (options.target_dir, options.log_dir):
        directories.make(directory)
    for directory in (options.socket_dir, options.ssh_key_dir):
        directories.make(directory, private=True)


def remember_ready(options: Options) -> None:
    """Record that the data disk was in use, so that it is never formatted."""
    target = TargetPaths(options.target_dir)
    machine = data.load_machine(target)
    if not machine.data_ever_ready:
        data.save_machine(target, msgspec.structs.replace(machine, data_ever_ready=True))


async def reset(options: Options, *, with_data: bool) -> None:
    """Recreate every file from its origin, and the data disk if requested; delete a saved state.

    Raises as :func:`choose` and :func:`install` do.
    """
    await asyncio.to_thread(
        origins.check_origins, options.origin_path, rootfs_must_be_btrfs=PROFILES[options.guest].rootfs_is_btrfs
    )
    async with lock.hold(locked_directories(options), wait_s=0, brief=True):
        await _make_files(options, force=True, without_data=with_data)
        await in_thread(partial(saved_state.discard, TargetPaths(options.target_dir)))
