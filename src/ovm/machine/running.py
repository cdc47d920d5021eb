"""One running machine, from its boot to its end: operations on it, and requests of its podman."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ovm.errors import GuestError, OVMError, PortError
from ovm.guest.boot_channel import ReadyChannel
from ovm.guest.clock import Clock, spoken
from ovm.guest.ssh import SSH
from ovm.hypervisors import Control
from ovm.machine.profiles import PROFILES, Profile
from ovm.model.options import Options
from ovm.model.ports import Forward, Protocol
from ovm.model.results import ClockSync
from ovm.model.validation import check_address
from ovm.network.forwarding import Network
from ovm.paths import SocketPaths
from ovm.process.child import Child
from ovm.wire import http
from ovm.wire.error import WireError

log = logging.getLogger(__name__)

PING = "/libpod/_ping"
PING_TIMEOUT_S = 60.0
REACH_AGAIN_S = 0.2
REATTACH_S = 2.0
"""Retry interval for a guest that does not answer; it may be paused, or rebooting."""


@dataclass(kw_only=True)
class Session:
    """The parts of a running machine, and its open host ports."""

    options: Options
    network: Network
    vm: Control
    channel: ReadyChannel
    ssh: SSH
    clock: Clock
    sockets: SocketPaths
    podman_port: int | None
    guard: Child
    helpers_changed: Callable[[], object]
    """Called when a helper was replaced and the new one is up."""
    console_log: Path
    console_read: int = 0
    """Size of the console log when the guest was last ready."""
    initrd_is_read: bool = True
    """Whether a ready guest no longer needs ``boot.initrd``."""
    on_refused: Callable[[PortError], object] = log.warning
    """Called once for each port of a container that could not be opened, until it could."""
    facts: dict[str, str] = field(default_factory=dict)
    """The facts recorded with a saved state; empty if the machine cannot be suspended."""

    _refused: set[tuple[str, str]] = field(default_factory=set)

    @property
    def forwards(self) -> dict[tuple[str, str], Forward]:
        """The host ports open for the user and for containers."""
        return self.network.forwards

    @property
    def children(self) -> tuple[Child, ...]:
        """Every helper, the guard first."""
        return self.guard, self.vm.child, self.network.child, *self.vm.daemons

    @property
    def profile(self) -> Profile:
        """The profile of the guest."""
        return PROFILES[self.options.guest]

    async def attach(self) -> None:
        """Wait until podman answers through the user's socket, and connect over ssh so that ports are published.

        Raises:
            GuestError: the guest cannot be reached, although it reported ready.
        """
        await self.profile.until_reachable(self.ssh)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._until_ping(give_up_s=PING_TIMEOUT_S))
            tasks.create_task(self._connect())  # podman announces published ports over this connection

    async def _connect(self) -> None:
        self.podman_port = await self.profile.connect(self.ssh, self.options, self.podman_port)

    async def ping(self, *, timeout_s: float = PING_TIMEOUT_S) -> None:
        """Check that podman answers through the user's socket.

        Raises:
            GuestError: podman did not answer within ``timeout_s`` seconds.
        """
        async with http.connect(self.sockets.podman) as podman:
            try:
                await podman.text(PING, timeout_s=timeout_s)
            except WireError as error:
                raise GuestError(f"podman does not answer: {error.message}") from error

    async def keep_attached(self) -> None:
        """Reconnect whenever the ssh connection is lost, because podman announces ports over it. Never returns."""
        while True:
            await self.ssh.wait_lost()
            try:
                await self.ssh.connect()
            except OVMError as error:
                log.info("could not reconnect to the guest: %s", error.message)
                await asyncio.sleep(REATTACH_S)

    async def restore_network(self, *, reach: bool = True) -> list[PortError]:
        """Start a new gvproxy for the running guest, after the last one died; containers keep running.

        Without ``reach``, do not wait for the guest, which boots or is paused.

        Returns the ports that could not be opened again; they are closed now.

        Raises:
            StartError: gvproxy does not start.
            PortError: the port of ssh or podman could not be opened again.
            GuestError: the guest cannot be connected to the new gvproxy, or does not answer through it.
        """
        await self.network.begin_again()
        self.helpers_changed()
        # only now: the hypervisor connects to the new gvproxy's socket
        await self.vm.replug(self.sockets.network_card)
        # before anything is reached: these connections went through the dead gvproxy, and would not report an error
        await self.ssh.close()
        await self.clock.close()
        reach = reach and self.profile.engine
        if reach:  # before podman can be reached, its announcements of ports must arrive again
            await self.network.reopen_port(self.ssh.port)
            await self.ssh.reach()
        lost = await self.network.reopen()
        if reach:
            await self._until_ping()
        return lost

    async def open_again(self, forwards: Iterable[Forward]) -> list[PortError]:
        """Open the ports that were open when the guest was suspended; return the errors of those that fail."""
        lost = []
        for forward in forwards:
            try:
                await self.network.expose(forward)
            except PortError as error:
                lost.append(error)
        return lost

    async def reach_again(self, *, known_ssh_port: int | None) -> None:
        """After a resume, wait until the guest is connected, its clock is set, and podman answers.

        ``known_ssh_port`` is the host port of sshd that the guest's firewall already blocks.

        Raises:
            GuestError: the guest cannot be reached.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._until_ping())
            await self.ssh.reach()
            if known_ssh_port != self.ssh.port:
                tasks.create_task(self.profile.block_port(self.ssh, self.ssh.port))
            await self.sync_clock()

    async def _until_ping(self, *, give_up_s: float = math.inf) -> None:
        """Wait until podman answers.

        Connections fail at first: the guest may still hold some of the last gvproxy, and gvproxy's tunnel to the
        guest's socket may still be the one of the last boot.

        Raises:
            GuestError: podman did not answer for ``give_up_s`` seconds.
        """
        give_up = time.monotonic() + give_up_s
        while True:
            try:
                return await self.ping()
            except GuestError as error:
                if time.monotonic() > give_up:
                    raise
                log.debug("%s", error.message)
                await asyncio.sleep(REACH_AGAIN_S)

    async def publish(self, wanted: Forward, opened: bool) -> None:
        """Open or close a port that podman announces, on ``publish_address`` unless ``-p`` names an address.

        Raises:
            PortError: the port is taken or may not be bound.
        """
        address = check_address("published address", wanted.host_address or self.options.publish_address)
        forward = msgspec.structs.replace(wanted, host_address=address)
        known = self.forwards.get(forward.key)
        if opened:
            if not self.network.keeps(forward):  # podman announces its ports again after a restart
                await self._expose_or_report(forward)
        elif known is not None and known.purpose == "container":
            await self.network.unexpose(known)

    async def _expose_or_report(self, forward: Forward) -> None:
        try:
            await self.network.expose(forward)
        except PortError as error:
            if forward.key not in self._refused:  # the guest retries
                self._refused.add(forward.key)
                self.on_refused(error)
            raise
        self._refused.discard(forward.key)

    async def export(self, host_port: int, guest_port: int, protocol: Protocol, address: str) -> Forward:
        """Forward a host port, or any free one for 0, to a guest port; raises PortError."""
        if host_port == 0:
            return await self.network.pick(guest_port, protocol=protocol, address=address, listed=True)
        forward = Forward(protocol=protocol, host_address=address, host_port=host_port, guest_port=guest_port)
        if not self.network.keeps(forward):
            await self.network.expose(forward)
        return forward

    async def unexport(self, host_port: int, protocol: Protocol, address: str) -> None:
        """Close a port that :meth:`export` opened; raises PortError."""
        forward = Forward(protocol=protocol, host_address=address, host_port=host_port, guest_port=0)
        known = self.forwards.get(forward.key)
        if known is None or known.purpose != "export":
            exported = ", ".join(f"{f.protocol} {f.local}" for f in self.forwards.values()) or "none"
            raise PortError(
                f"{protocol} port {forward.local} is not exported", hint=f"use one of the open ports: {exported}"
            )
        await self.network.unexpose(known)

    async def guest_was_reset(self) -> None:
        """Close the connections and container ports of the last boot. Containers that start again announce theirs."""
        await self.ssh.close()  # first: a caller that waits for an answer of the old boot must fail
        await self.clock.close()
        for forward in [f for f in self.forwards.values() if f.purpose == "container"]:
            with contextlib.suppress(PortError):
                await self.network.unexpose(forward)

    async def sync_clock(self) -> ClockSync:
        """Set the guest's clock."""
        result = await self.clock.sync()
        log.debug("the guest's clock was %s off", spoken(result.offset_before_s))
        return result

    async def settle(self) -> None:
        """Do the work that can wait until the machine is ready."""
        await self.profile.let_containers_start(self.ssh)
        try:
            await self.sync_clock()
        except OVMError as error:
            log.warning("could not set the guest's clock: %s", error.message)
        await self.kick_chrony()

    async def kick_chrony(self) -> None:
        """Have chrony query its servers. Best effort: a host without a network cannot reach them."""
        with contextlib.suppress(OVMError):
            await self.clock.kick_chrony()


@contextlib.asynccontextmanager
async def open_session(session: Session) -> AsyncIterator[Session]:
    """Publish the ports that podman announces; close the connections of ``session`` on exit."""
    # before the first connect, which sets up the listener for podman's announcements
    session.profile.publish(session.ssh, session.publish)
    try:
        yield session
    finally:
        await session.ssh.close()
        await session.clock.close()
