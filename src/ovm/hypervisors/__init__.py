"""The interface between a machine and its hypervisor.

A hypervisor's module has a pure function ``command(…) -> argv``, a :class:`Driver`, which create chooses and checks,
and a :class:`Control` of the running program.
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
    """Return the architecture of this host.

    Raises:
        UnsupportedError: ovm has no guest for it.
    """
    machine = platform.machine().lower()
    if (arch := architectures.find(machine)) is None:
        raise UnsupportedError(f"ovm has no guest for {machine} processors", hint="use an x86_64 or arm64 host")
    return arch.machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A raw disk image; the disks' order is their order in the guest (vda, vdb, …)."""

    name: str
    """Serial number in the guest, 20 bytes at most."""
    path: Path
    read_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A shared host folder; the guest mounts it by ``tag``."""

    tag: str
    host_path: Path
    read_only: bool
    socket: Path
    """Socket of virtiofsd; unused by hypervisors that share folders themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Channel:
    """Streams from the guest to a socket that already listens on the host."""

    name: str
    """Name of the virtio-serial port where there is no vsock."""
    vsock_port: int
    socket: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class VMSpec:
    """A virtual machine, independent of the hypervisor."""

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
    """Socket for the network card's frames; ``None`` for a guest whose network runs over a channel."""
    mac: str
    console_log: Path
    control_socket: Path
    """Control socket, for hypervisors that have one."""
    rosetta: bool = False
    """Whether the guest gets Rosetta, Apple's translator of x86_64 programs."""
    waits_for_memory: bool = False
    """Whether the guest does not boot, but waits paused until :meth:`Control.load` loads a saved state."""


class Happening(StrEnum):
    """An event that the hypervisor reports unprompted."""

    PAUSED = "paused"
    RESUMED = "resumed"
    REBOOTED = "rebooted"
    POWERED_OFF = "powered off"
    FAILED = "failed"
    DISK_ERROR = "disk error"
    """A disk failed; the guest got the error, keeps running and handles it itself."""
    OUT_OF_SPACE = "out of space"
    """The host's disk is full: the guest is stopped until the host has space and the guest is resumed."""


Watcher = Callable[[Happening, str], None]
"""Called with the event and the hypervisor's own description, empty if there is none."""


Card = Literal["qemu", "vfkit"]
"""Transport of Ethernet frames: QEMU's stream, or vfkit's datagrams."""


class Control(Protocol):
    """A running virtual machine."""

    child: Child
    daemons: tuple[Child, ...]
    """Helper processes that serve the machine and end with it."""

    async def state(self) -> VMState:
        """Query the current state from the hypervisor."""

    async def pause(self) -> None:
        """Stop the virtual CPUs; no error if they are stopped already."""

    async def resume(self) -> None:
        """Resume the virtual CPUs; no error if they run already."""

    async def request_stop(self) -> bool:
        """Press the power button, and return at once whether that worked; the guest may ignore it."""

    async def force_stop(self) -> None:
        """Cut the power."""

    async def replug(self, network_socket: Path) -> None:
        """Connect the guest's network card to the new gvproxy on ``network_socket``, if the driver can."""

    async def save(self, memory: int, *, timeout_s: float) -> None:
        """Pause the guest, flush its disks and write its saved state to the open file ``memory``, if the driver can.

        Raises:
            GuestError: it failed; the guest is in its previous state again.
        """

    async def load(self, memory: int, *, timeout_s: float) -> None:
        """Load a saved state into the waiting guest, which stays paused until :meth:`resume`.

        Raises:
            OVMError: it failed, and this machine is unusable.
        """


class Driver(Protocol):
    """A usable hypervisor of this host, and how to run it."""

    @property
    def name(self) -> str:
        """Name of its process and its log."""

    @property
    def arch(self) -> Arch:
        """Architecture of its guests."""

    @property
    def card(self) -> Card:
        """Transport of the guest's Ethernet frames."""

    @property
    def tells_resets(self) -> bool:
        """Whether it reports when a guest resets itself; if not, the guest's first boot message shows it."""

    @property
    def can_replug(self) -> bool:
        """Whether a running guest's network card can be connected to another gvproxy."""

    @property
    def vsock(self) -> bool:
        """Whether a guest's channels are vsock ports, which every process in the guest can open."""

    @property
    def reads_initrd_once(self) -> bool:
        """Whether a guest that resets itself boots without reading the initrd file again."""

    @property
    def can_suspend(self) -> bool:
        """Whether it can write a guest's saved state to disk and load it."""

    def identity(self, spec: VMSpec) -> str:
        """Return what a saved state depends on besides the files: program, processor, devices. May read files."""

    @property
    def accelerator(self) -> str:
        """Accelerator that runs the guest's instructions."""

    @property
    def accelerator_reason(self) -> str:
        """Why this accelerator was chosen."""

    def logs(self, shares: int) -> list[str]:
        """Return the names of the logs of a machine with that many shared folders."""

    def start(
        self, group: Group, spec: VMSpec, *, logs: Mapping[str, Path], watcher: Watcher
    ) -> AbstractAsyncContextManager[Control]:
        """Run the machine; on exit, power it off and end all its processes.

        Raises:
            StartError: it did not start.
        """
