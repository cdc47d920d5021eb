"""The kinds of guest: devices, network, boot configuration and connections of each.

A caller uses the profile's methods and never checks the kind. A new kind of guest changes only this module.
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
"""The equivalent of ``systemctl poweroff`` without logind, which the guest does not have."""
ATTACHED = "/usr/lib/ovm/attached"
"""Program that reports to the guest that published ports are served, so that containers may start."""
HEALTH = "/usr/lib/ovm/health"
"""Program that reports the data disk in one line: size and free bytes, ``rw`` or ``ro``, number of errors."""
NOT_FOUND = 127
"""A shell's exit status for a missing program: the guest's image is older."""
FIREWALLED = ("inet", "netdev")
"""Families of the guest's two firewall tables."""
PODMAN_SOCKET = "/run/podman/podman.sock"
"""Socket of root's podman in the guest."""
PODMAN_GUEST_PORT = 58125
NETWORK_VSOCK_PORT = 1024
ANSWER_TIMEOUT_S = 60.0

_OUR_PROGRAMS = ("dns", "ssh_agent", "foreign_arch")
"""Options that need ovm's own programs in the guest."""


class Profile:
    """A bare guest: it reports ready and has no sshd. Other kinds override what differs."""

    name: ClassVar[GuestProfile] = "bare"
    engine: ClassVar[bool] = False
    """Whether the guest runs sshd and podman."""
    reports_boot: ClassVar[bool] = True
    """Whether the guest reports its first boot steps, so that a long silence means that its kernel hangs."""
    rootfs_is_btrfs: ClassVar[bool] = False
    power_off: ClassVar[Sequence[str]] = ()
    """The command that shuts the guest down; empty if only its power button does."""

    # -- options and devices

    def check_hypervisor(self, *, vsock: bool) -> None:
        """Refuse a hypervisor that this guest cannot run under.

        Raises:
            UnsupportedError: the guest cannot run under it.
        """

    def check_options(self, options: Options) -> None:
        """Refuse options that this guest does not support; changes nothing.

        Raises:
            OptionError: an option is not supported; names it.
        """
        self._refuse(options, _OUR_PROGRAMS)
        if options.mounts:
            raise OptionError("a bare guest cannot mount host folders", hint="use mounts=[]")

    def _refuse(self, options: Options, names: Sequence[str]) -> None:
        if given := [name for name in names if getattr(options, name)]:
            raise OptionError(
                f"guest={self.name!r} does not support {' and '.join(given)}",
                hint=f'use guest="ovm", or remove {" and ".join(given)}',
            )

    def fit(self, spec: VMSpec, initrd: Path, target: TargetPaths, sockets: SocketPaths) -> VMSpec:
        """Return ``spec`` adapted to this guest, whose image has ``initrd``; unchanged for most kinds."""
        return spec

    def wire(self, card: Card) -> Wire:
        """Return how the guest's frames reach gvproxy under a hypervisor with this network ``card``."""
        return card

    def gvproxy_reads(self, keys: KeyPaths) -> Sequence[Path]:
        """Return the user's files that gvproxy must be able to read."""
        return ()

    async def open_podman(
        self, network: Network, sockets: SocketPaths, options: Options, *, first: int = PODMAN_PORT_FIRST
    ) -> int | None:
        """Open podman's socket on the host, and its port from ``first`` up if that is possible before the boot.

        Returns the port, if one was opened.

        Raises:
            PortError: no port is free.
        """
        return None

    # -- boot configuration

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
        """Provide the boot configuration to each boot, until this context is left.

        Args:
            options: The machine's options.
            initrd: The initrd of the guest's image.
            channel_key: Prefix of the guest's messages; empty if no other program can connect to the channel.
            blocked_ports: TCP ports of the host that no program in the guest may reach.
            asked: Called at each boot, for guests that request their configuration.

        Raises:
            FileError: a file cannot be read or written, or the boot would destroy the data disk.
        """

        def write() -> None:
            config = instructions.boot_config(options, channel_key=channel_key, blocked_host_ports=blocked_ports)
            bootconfig.write_initrd(initrd, config, SocketPaths(options.socket_dir).boot_initrd)

        await in_thread(write)
        yield

    # -- connections, after the guest has reported ready

    async def until_reachable(self, ssh: SSH) -> None:
        """Wait until sshd answers, if the guest reports ready before its sshd is.

        Raises:
            GuestError: sshd does not answer.
        """

    async def connect(self, ssh: SSH, options: Options, podman_port: int | None) -> int | None:
        """Connect over ssh, and forward podman's port if gvproxy does not; return podman's port.

        Raises:
            GuestError: sshd does not answer.
            PortError: no port is free for podman.
        """
        await ssh.connect()
        return podman_port

    def clock(self, ssh: SSH) -> Clock:
        """Return the setter of the guest's clock."""
        return Clock(ssh)

    def publish(self, ssh: SSH, decide: Decide) -> None:
        """Call ``decide`` for each port that podman announces over ``ssh``, to open or close it."""

    async def let_containers_start(self, ssh: SSH) -> None:
        """Report that published ports are served. Best effort: without the report the guest starts containers later."""

    async def block_port(self, ssh: SSH, port: int) -> None:
        """Block a TCP port of the host in the guest's firewall, in addition to those blocked at boot.

        Raises:
            GuestError: the firewall did not accept the rule.
        """

    async def disk_report(self, ssh: SSH, *, timeout_s: float) -> bytes | None:
        """Return the guest's report on its data disk; ``None`` if it answers without a report.

        Raises:
            GuestError: the guest does not answer.
        """
        return None


class OVMGuest(Profile):
    """ovm's image, with its programs below /usr/lib/ovm and its firewall."""

    name = "ovm"
    engine = True
    rootfs_is_btrfs = True
    power_off = POWER_OFF

    def check_options(self, options: Options) -> None:
        """Accept every option."""

    async def open_podman(
        self, network: Network, sockets: SocketPaths, options: Options, *, first: int = PODMAN_PORT_FIRST
    ) -> int | None:
        """Forward both to podman's port in the guest."""
        await network.expose_socket(sockets.made_by_gvproxy(sockets.podman), PODMAN_GUEST_PORT)
        if not options.podman_tcp:
            return None
        return (await network.pick(PODMAN_GUEST_PORT, first=first)).host_port

    def publish(self, ssh: SSH, decide: Decide) -> None:
        """Receive ports from the guest's publisher, which connects to a port forwarded over ssh."""
        Publisher(ssh, decide)

    async def let_containers_start(self, ssh: SSH) -> None:
        """Run ovm's program in the guest."""
        try:
            told = await ssh.exec([ATTACHED], timeout_s=ANSWER_TIMEOUT_S)
        except OVMError as error:
            log.warning("could not let the guest start its containers: %s", error.message)
        else:
            if told.exit_status != 0:
                log.warning("the guest did not accept this manager: %s", GuestText(told.stderr))

    async def block_port(self, ssh: SSH, port: int) -> None:
        """Block the port in both tables of the firewall."""
        added = "; ".join(f"add element {family} ovm blocked_host_ports {{ {port} }}" for family in FIREWALLED)
        told = await ssh.exec(["nft", added], timeout_s=ANSWER_TIMEOUT_S)
        if told.exit_status != 0:
            raise GuestError(f"the guest's firewall did not block port {port}: {GuestText(told.stderr)}")

    async def disk_report(self, ssh: SSH, *, timeout_s: float) -> bytes | None:
        """Run ovm's program in the guest, which older images do not have."""
        answer = await ssh.exec([HEALTH], timeout_s=timeout_s)
        return None if answer.exit_status == NOT_FOUND else answer.stdout


class CoreGuest(Profile):
    """An image of the seed: it requests a shell command on vsock 1025 and connects its network over vsock 1024.

    It has none of ovm's programs.
    """

    name = "ovm-core"
    engine = True
    reports_boot = False
    rootfs_is_btrfs = True
    power_off = POWER_OFF

    def check_hypervisor(self, *, vsock: bool) -> None:
        """Require vsock."""
        if not vsock:
            raise UnsupportedError("ovm-core guests require vfkit", hint='use create_darwin_ovm, or guest="ovm"')

    def check_options(self, options: Options) -> None:
        """Check that the configuration fits into one command, with placeholder keys of the real length."""
        self._refuse(options, _OUR_PROGRAMS)
        keys = {"authorized_key": "k" * 84, "host_key": "k" * 400, "host_key_public": "k" * 90}
        ovm_core.shell_command(instructions.configure(options, **keys, machine_id="", channel_key="k" * 32))

    def fit(self, spec: VMSpec, initrd: Path, target: TargetPaths, sockets: SocketPaths) -> VMSpec:
        """Add a scratch disk, which the guest formats at every boot, before the data disk; add the vsock channels."""
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
        """Use the guest's own connection to gvproxy."""
        return "channel"

    def gvproxy_reads(self, keys: KeyPaths) -> Sequence[Path]:
        """Return the user's key, because gvproxy's tunnel to podman is an ssh connection."""
        return (keys.user_key,)

    async def open_podman(
        self, network: Network, sockets: SocketPaths, options: Options, *, first: int = PODMAN_PORT_FIRST
    ) -> int | None:
        """Tunnel to podman's socket; podman has no port in this guest, so :meth:`connect` forwards one to it."""
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
        """Serve the configuration as a shell command, with a new, empty scratch disk."""
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
        """Wait for sshd: the guest reports ready before its network is."""
        await ssh.reach()

    async def connect(self, ssh: SSH, options: Options, podman_port: int | None) -> int | None:
        """Forward podman's port over ssh; a new connection forwards it again."""
        await ssh.connect()
        if options.podman_tcp and podman_port is None:
            return await ssh.forward_port(PODMAN_PORT_FIRST, PODMAN_SOCKET)
        return podman_port

    def clock(self, ssh: SSH) -> Clock:
        """Set the clock with commands of the image."""
        return Clock(ssh, helper=CORE_HELPER, kick=CORE_KICK, good_enough_s=CORE_GOOD_ENOUGH_S)

    async def disk_report(self, ssh: SSH, *, timeout_s: float) -> bytes | None:
        """Only check that the guest answers; it has no report."""
        await ssh.exec(["true"], timeout_s=timeout_s)
        return None


PROFILES: dict[GuestProfile, Profile] = {profile.name: profile for profile in (Profile(), OVMGuest(), CoreGuest())}
