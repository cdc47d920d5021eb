"""The seam between a machine and the program that runs it.

A hypervisor's module has ``command(…) -> argv``, pure; a :class:`Driver`, which is what create chose and checked; and
a :class:`Control` of the running program.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

from ovm.errors import UnsupportedError
from ovm.model import architectures
from ovm.model.architectures import Arch as Arch
from ovm.model.states import VMState
from ovm.process.child import Child, Group


def host_arch() -> Arch:
    """The processor of this host.

    Raises:
        UnsupportedError: there is no guest for it.
    """
    machine = platform.machine().lower()
    if (arch := architectures.find(machine)) is None:
        raise UnsupportedError(f"ovm has no guest for {machine} processors", hint="x86_64 and arm64 hosts can run it")
    return arch.machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A raw image; the order of disks is their order in the guest (vda, vdb, …)."""

    name: str
    """Serial number the guest sees, 20 bytes at most."""
    path: Path
    read_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A host folder, under the ``tag`` by which the guest mounts it."""

    tag: str
    host_path: Path
    read_only: bool
    socket: Path
    """Where virtiofsd listens; unused by hypervisors that share folders themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Channel:
    """Streams the guest opens to a socket that somebody on the host listens on already."""

    name: str
    """Name of the virtio-serial port, where there is no vsock."""
    vsock_port: int
    socket: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class VMSpec:
    """A virtual machine, in words no hypervisor owns."""

    arch: Arch
    cpus: int
    memory_mib: int
    kernel: Path
    initrd: Path
    cmdline: str
    disks: tuple[Disk, ...]
    shares: tuple[Share, ...]
    channels: tuple[Channel, ...]
    network_socket: Path | None
    """Where the network card's frames go; ``None`` for a guest that brings its network along, over a channel."""
    mac: str
    console_log: Path
    control_socket: Path
    """Where a hypervisor that serves its control on a socket does so."""
    rosetta: bool = False
    """Whether the guest gets Apple's translator of x86_64 programs."""
    waits_for_memory: bool = False
    """Whether it waits, paused, for a saved state instead of booting."""


class Happening(StrEnum):
    """What a hypervisor tells of its own accord."""

    PAUSED = "paused"
    RESUMED = "resumed"
    REBOOTED = "rebooted"
    POWERED_OFF = "powered off"
    FAILED = "failed"
    DISK_ERROR = "disk error"
    """A disk failed, and the guest runs on: it was told, and decides itself what to do."""
    OUT_OF_SPACE = "out of space"
    """Stopped until the host has room for what the guest wrote, and somebody resumes it."""


Watcher = Callable[[Happening, str], None]
"""Called with what happened and, where there is more to say, the hypervisor's own words."""


Card = Literal["qemu", "vfkit"]
"""How a hypervisor hands over Ethernet frames: QEMU's stream, or vfkit's datagrams."""


class Control(Protocol):
    """A running virtual machine."""

    child: Child
    daemons: tuple[Child, ...]
    """Helpers that serve it and end with it."""

    async def state(self) -> VMState:
        """What the hypervisor itself says now."""

    async def pause(self) -> None:
        """Pause the virtual CPUs; fine if they are paused."""

    async def resume(self) -> None:
        """Let them run; fine if they do."""

    async def request_stop(self) -> bool:
        """Press the power button; returns at once whether it could be pressed, and the guest may ignore it."""

    async def force_stop(self) -> None:
        """Cut the power."""

    async def replug(self, network_socket: Path) -> None:
        """Lead the guest's network card to the gvproxy that listens there now, if the driver can."""

    async def save(self, memory: int, *, timeout_s: float) -> None:
        """Pause the guest and write its state to the open file ``memory``, if the driver can; its disks are flushed.

        Raises:
            GuestError: it could not be done; the guest does what it did.
        """

    async def load(self, memory: int, *, timeout_s: float) -> None:
        """Load a saved state into the guest that waits for one; it is paused until it is resumed.

        Raises:
            OVMError: it could not be done, and this machine is good for nothing now.
        """


class Driver(Protocol):
    """A hypervisor of this host that will do, and how it is run."""

    @property
    def name(self) -> str:
        """What its process and its log are called."""

    @property
    def arch(self) -> Arch:
        """The processor of its guests."""

    @property
    def card(self) -> Card:
        """How it hands over the guest's Ethernet frames."""

    @property
    def tells_resets(self) -> bool:
        """Whether it says when a guest resets itself; of others, the guest's own first words tell."""

    @property
    def can_replug(self) -> bool:
        """Whether a running guest's network can be led to another gvproxy."""

    @property
    def vsock(self) -> bool:
        """Whether a guest's channels are vsock ports, which whoever is in the guest may open."""

    @property
    def reads_initrd_once(self) -> bool:
        """Whether a guest that resets itself needs the file no more."""

    @property
    def can_suspend(self) -> bool:
        """Whether a guest's memory can be saved to disk, and loaded from there."""

    def identity(self, spec: VMSpec) -> str:
        """What a memory of that machine depends on, besides its files: program, processor, devices. May read files."""

    @property
    def accelerator(self) -> str:
        """What runs the guest's instructions."""

    @property
    def accelerator_reason(self) -> str:
        """Why that and nothing else."""

    def logs(self, shares: int) -> list[str]:
        """The names of the logs a machine with that many shared folders writes."""

    def start(
        self, group: Group, spec: VMSpec, *, logs: Mapping[str, Path], watcher: Watcher
    ) -> AbstractAsyncContextManager[Control]:
        """The machine under power; off, and every process of it ended, on the way out.

        Raises:
            StartError: it did not come up.
        """
