"""The kinds of guest, and how the host treats each: its devices, its network, what it is told, how it is reached.

A caller asks the profile, and never which kind it is. To a new kind of guest this module is all that changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import ClassVar

from ovm.disks import data
from ovm.errors import GuestError, OptionError, OVMError, UnsupportedError
from ovm.guest import bootconfig, ovm_core
from ovm.guest.clock import CORE_GOOD_ENOUGH_S, CORE_HELPER, CORE_KICK, Clock
from ovm.guest.port_publisher import Decide, Publisher
from ovm.guest.ssh import SSH
from ovm.hypervisors import Card, Channel, Disk, VMSpec
from ovm.machine import instructions
from ovm.model.options import PODMAN_PORT_FIRST, Options
from ovm.model.validation import GuestProfile
from ovm.network.forwarding import Network
from ovm.network.gvproxy import Wire
from ovm.paths import KeyPaths, SocketPaths, TargetPaths
from ovm.process.threads import in_thread
from ovm.text.printable import GuestText

log = logging.getLogger(__name__)

POWER_OFF = ("systemctl", "start", "--no-block", "--job-mode=replace-irreversibly", "poweroff.target")
"""What ``systemctl poweroff`` does where there is no logind to ask, which the guest has not."""
ATTACHED = "/usr/lib/ovm/attached"
"""Tells the guest that published ports are served, so that containers may start."""
HEALTH = "/usr/lib/ovm/health"
"""Tells of the data disk in one line: its size and what is free in bytes, ``rw`` or ``ro``, errors it has counted."""
NOT_FOUND = 127
"""What a shell says of a program that is not there: the guest's image is an older one."""
FIREWALLED = ("inet", "netdev")
"""The families of the guest's two firewall tables."""
PODMAN_SOCKET = "/run/podman/podman.sock"
"""Of root's podman in the guest."""
PODMAN_GUEST_PORT = 58125
NETWORK_VSOCK_PORT = 1024
ANSWER_TIMEOUT_S = 60.0

_OUR_PROGRAMS = ("dns", "ssh_agent", "foreign_arch")
"""Options that programs of ours carry out in the guest."""


class Profile:
    """A guest that says when it is ready and has no sshd; what another kind has or does otherwise, it overrides."""

    name: ClassVar[GuestProfile] = "bare"
    engine: ClassVar[bool] = False
    """Whether sshd and podman answer in it."""
    reports_boot: ClassVar[bool] = True
    """Whether it reports its first steps, so that long silence means that its kernel hangs."""
    rootfs_is_btrfs: ClassVar[bool] = False
    power_off: ClassVar[Sequence[str]] = ()
    """The command that shuts it down; empty if it has its power button alone."""

    # -- what it is made of

    def check_hypervisor(self, *, vsock: bool) -> None:
        """Refuse a hypervisor that this guest cannot run under.

        Raises:
            UnsupportedError: it cannot.
        """

    def check_options(self, options: Options) -> None:
        """Refuse options that this guest cannot carry out; reads only.

        Raises:
            OptionError: says which.
        """
        self._refuse(options, _OUR_PROGRAMS)
        if options.mounts:
            raise OptionError("a bare guest mounts nothing", hint="give it none: mounts=[]")

    def _refuse(self, options: Options, names: Sequence[str]) -> None:
        if given := [name for name in names if getattr(options, name)]:
            raise OptionError(
                f"{' and '.join(given)} cannot be had with guest={self.name!r}",
                hint='use guest="ovm", or leave it out',
            )

    def fit(self, spec: VMSpec, initrd: Path, target: TargetPaths, sockets: SocketPaths) -> VMSpec:
        """Return ``spec`` with the devices of this guest, whose image has ``initrd``; as it is, it suits most."""
        return spec

    def wire(self, card: Card) -> Wire:
        """How its frames reach gvproxy under a hypervisor that hands them over by ``card``."""
        return card

    def gvproxy_reads(self, keys: KeyPaths) -> Sequence[Path]:
        """The user's files that gvproxy must read for it."""
        return ()

    async def open_podman(
        self, network: Network, sockets: SocketPaths, options: Options, *, first: int = PODMAN_PORT_FIRST
    ) -> int | None:
        """Open podman's socket on the host, and its port from ``first`` up if it can be opened before the boot.

        Returns that port.

        Raises:
            PortError: none is free.
        """
        return None

    # -- what it is told

    @contextlib.asynccontextmanager
    async def told(
        self,
        options: Options,
        initrd: Path,
        *,
        channel_key: str,
        blocked_ports: tuple[int, ...],
        asked: Callable[[], None],
    ) -> AsyncIterator[None]:
        """Have each boot find its instructions, until this is left.

        Args:
            options: Of the machine.
            initrd: Of the guest's image.
            channel_key: What its messages begin with; empty where nobody else can send any.
            blocked_ports: TCP ports of the host that nobody in the guest may reach.
            asked: Called at each boot, by guests that ask for their instructions.

        Raises:
            FileError: they cannot be read or written, or the boot would cost the data disk.
        """

        def write() -> None:
            config = instructions.boot_config(options, channel_key=channel_key, blocked_host_ports=blocked_ports)
            bootconfig.write_initrd(initrd, config, SocketPaths(options.socket_dir).boot_initrd)

        await in_thread(write)
        yield

    # -- how it is reached, once it has said that it is ready

    async def until_reachable(self, ssh: SSH) -> None:
        """Wait until sshd answers, where the guest's ready does not say that it does.

        Raises:
            GuestError: it does not answer.
        """

    async def connect(self, ssh: SSH, options: Options, podman_port: int | None) -> int | None:
        """Connect over ssh, and forward podman's port if nothing else does; returns podman's port.

        Raises:
            GuestError: sshd does not answer.
            PortError: no port is free for podman.
        """
        await ssh.connect()
        return podman_port

    def clock(self, ssh: SSH) -> Clock:
        """Return what sets its clock."""
        return Clock(ssh)

    def publish(self, ssh: SSH, decide: Decide) -> None:
        """Have ``decide`` open and close the ports that podman announces over ``ssh``."""

    async def let_containers_start(self, ssh: SSH) -> None:
        """Report that published ports are served. Best effort: a guest that hears nothing starts containers later."""

    async def block_port(self, ssh: SSH, port: int) -> None:
        """Have its firewall block a TCP port of the host, besides those it was told of at boot.

        Raises:
            GuestError: it does not.
        """

    async def disk_report(self, ssh: SSH, *, timeout_s: float) -> bytes | None:
        """What it reports of its data disk; ``None`` if it answers, but has no report.

        Raises:
            GuestError: it does not answer.
        """
        return None


class OVMGuest(Profile):
    """Our image: it has our programs below /usr/lib/ovm, the clock's, the publisher's, the firewall."""

    name = "ovm"
    engine = True
    rootfs_is_btrfs = True
    power_off = POWER_OFF

    def check_options(self, options: Options) -> None:
        """Every option is one for this guest."""

    async def open_podman(
        self, network: Network, sockets: SocketPaths, options: Options, *, first: int = PODMAN_PORT_FIRST
    ) -> int | None:
        """A port of the guest's own is behind both."""
        await network.expose_socket(sockets.made_by_gvproxy(sockets.podman), PODMAN_GUEST_PORT)
        if not options.podman_tcp:
            return None
        return (await network.pick(PODMAN_GUEST_PORT, first=first)).host_port

    def publish(self, ssh: SSH, decide: Decide) -> None:
        """Its publisher connects to a port that the ssh connection listens on."""
        Publisher(ssh, decide)

    async def let_containers_start(self, ssh: SSH) -> None:
        """By a program of ours."""
        try:
            told = await ssh.exec([ATTACHED], timeout_s=ANSWER_TIMEOUT_S)
        except OVMError as error:
            log.warning("the guest could not be told to start its containers: %s", error.message)
        else:
            if told.exit_status != 0:
                log.warning("the guest did not take us for its manager: %s", GuestText(told.stderr))

    async def block_port(self, ssh: SSH, port: int) -> None:
        """In both of its firewall's tables."""
        added = "; ".join(f"add element {family} ovm blocked_host_ports {{ {port} }}" for family in FIREWALLED)
        told = await ssh.exec(["nft", added], timeout_s=ANSWER_TIMEOUT_S)
        if told.exit_status != 0:
            raise GuestError(f"the guest's firewall did not take a port: {GuestText(told.stderr)}")

    async def disk_report(self, ssh: SSH, *, timeout_s: float) -> bytes | None:
        """By a program of ours, which older images do not have."""
        answer = await ssh.exec([HEALTH], timeout_s=timeout_s)
        return None if answer.exit_status == NOT_FOUND else answer.stdout


class CoreGuest(Profile):
    """An image of the seed's time: it asks for a shell command on vsock 1025 and brings its network over vsock 1024.

    It has none of our programs.
    """

    name = "ovm-core"
    engine = True
    reports_boot = False
    rootfs_is_btrfs = True
    power_off = POWER_OFF

    def check_hypervisor(self, *, vsock: bool) -> None:
        """It needs vsock."""
        if not vsock:
            raise UnsupportedError("ovm-core guests want vfkit", hint='use create_darwin_ovm, or guest="ovm"')

    def check_options(self, options: Options) -> None:
        """All that it is told must fit into one command, with keys that are as long as ours will be."""
        self._refuse(options, _OUR_PROGRAMS)
        keys = {"authorized_key": "k" * 84, "host_key": "k" * 400, "host_key_public": "k" * 90}
        ovm_core.shell_command(instructions.configure(options, **keys, machine_id="", channel_key="k" * 32))

    def fit(self, spec: VMSpec, initrd: Path, target: TargetPaths, sockets: SocketPaths) -> VMSpec:
        """It formats its second disk at every boot, and keeps images and containers on its third."""
        rootfs, *others = spec.disks
        return dataclasses.replace(
            spec,
            initrd=initrd,
            disks=(rootfs, Disk(name="ovm-scratch", path=target.scratch_disk), *others),
            channels=(
                *spec.channels,
                Channel(name="ovm.network", vsock_port=NETWORK_VSOCK_PORT, socket=sockets.network_card),
                Channel(name="ovm.command", vsock_port=ovm_core.VSOCK_PORT, socket=sockets.command),
            ),
            network_socket=None,
        )

    def wire(self, card: Card) -> Wire:
        """The guest itself connects to gvproxy."""
        return "channel"

    def gvproxy_reads(self, keys: KeyPaths) -> Sequence[Path]:
        """Gvproxy's tunnel to podman is an ssh connection of its own."""
        return (keys.user_key,)

    async def open_podman(
        self, network: Network, sockets: SocketPaths, options: Options, *, first: int = PODMAN_PORT_FIRST
    ) -> int | None:
        """The guest has podman's socket alone; :meth:`connect` forwards a port to it."""
        key = KeyPaths(options.ssh_key_dir).user_key
        await network.expose_tunnel(sockets.made_by_gvproxy(sockets.podman), PODMAN_SOCKET, key)
        return None

    @contextlib.asynccontextmanager
    async def told(
        self,
        options: Options,
        initrd: Path,
        *,
        channel_key: str,
        blocked_ports: tuple[int, ...],
        asked: Callable[[], None],
    ) -> AsyncIterator[None]:
        """By a server; and its scratch disk is empty, without what the last start left on it."""
        target = TargetPaths(options.target_dir)

        def prepare() -> bytes:
            # first: a guest that finds no file system on the data disk formats it
            data.check_still_formatted(target)
            data.make_scratch_disk(target, options.data_disk_mib)
            return ovm_core.shell_command(instructions.boot_config(options, channel_key=channel_key))

        command = await in_thread(prepare)
        async with ovm_core.serve(SocketPaths(options.socket_dir).command, command, asked):
            yield

    async def until_reachable(self, ssh: SSH) -> None:
        """Its ready does not wait for its network."""
        await ssh.reach()

    async def connect(self, ssh: SSH, options: Options, podman_port: int | None) -> int | None:
        """Podman's port is forwarded over ssh; a new connection opens it again by itself."""
        await ssh.connect()
        if options.podman_tcp and podman_port is None:
            return await ssh.forward_port(PODMAN_PORT_FIRST, PODMAN_SOCKET)
        return podman_port

    def clock(self, ssh: SSH) -> Clock:
        """By commands that its image has."""
        return Clock(ssh, helper=CORE_HELPER, kick=CORE_KICK, good_enough_s=CORE_GOOD_ENOUGH_S)

    async def disk_report(self, ssh: SSH, *, timeout_s: float) -> bytes | None:
        """It has none, and is only asked for a sign of life."""
        await ssh.exec(["true"], timeout_s=timeout_s)
        return None


PROFILES: dict[GuestProfile, Profile] = {profile.name: profile for profile in (Profile(), OVMGuest(), CoreGuest())}
