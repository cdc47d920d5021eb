"""One running machine, from its boot to its end: what can be asked of it, and what its podman asks of us."""

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
"""Between two tries to reach a guest that does not answer; it may be paused, or rebooting."""


@dataclass(kw_only=True)
class Session:
    """The parts of a running machine, and what is open for it on the host."""

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
    """To be called when a helper has been replaced, and is what it is to be."""
    console_log: Path
    console_read: int = 0
    """Bytes of it that were there when the guest was last ready."""
    initrd_is_read: bool = True
    """Whether the guest needs ``boot.initrd`` no more once it is ready."""
    on_refused: Callable[[PortError], object] = log.warning
    """Called once for each port of a container that could not be opened, until it could."""
    facts: dict[str, str] = field(default_factory=dict)
    """What the guest's memory goes with, should it be kept; empty where it cannot."""

    _refused: set[tuple[str, str]] = field(default_factory=set)

    @property
    def forwards(self) -> dict[tuple[str, str], Forward]:
        """The host ports that are open for the user and for containers."""
        return self.network.forwards

    @property
    def children(self) -> tuple[Child, ...]:
        """Every helper, the guard first."""
        return self.guard, self.vm.child, self.network.child, *self.vm.daemons

    @property
    def profile(self) -> Profile:
        """What can be counted on in the guest."""
        return PROFILES[self.options.guest]

    async def attach(self) -> None:
        """After the guest's ready: until podman answers through the user's own socket, and ports are published.

        Raises:
            GuestError: the guest cannot be reached after all.
        """
        await self.profile.until_reachable(self.ssh)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._until_ping(give_up_s=PING_TIMEOUT_S))
            tasks.create_task(self._connect())  # published ports are announced over this connection

    async def _connect(self) -> None:
        self.podman_port = await self.profile.connect(self.ssh, self.options, self.podman_port)

    async def ping(self, *, timeout_s: float = PING_TIMEOUT_S) -> None:
        """Ask podman for a sign of life, by way of the user's own socket.

        Raises:
            GuestError: it gave none within ``timeout_s`` seconds.
        """
        async with http.connect(self.sockets.podman) as podman:
            try:
                await podman.text(PING, timeout_s=timeout_s)
            except WireError as error:
                raise GuestError(f"podman does not answer: {error.message}") from error

    async def keep_attached(self) -> None:
        """For ever: whenever the connection is lost, make it anew, or published ports would no longer be heard of."""
        while True:
            await self.ssh.wait_lost()
            try:
                await self.ssh.connect()
            except OVMError as error:
                log.info("not attached to the guest: %s", error.message)
                await asyncio.sleep(REATTACH_S)

    async def restore_network(self, *, reach: bool = True) -> list[PortError]:
        """Give the running guest another gvproxy, after the last one died; containers do not notice.

        Without ``reach`` a guest that boots or is paused is not waited for: it is reached once it runs.

        Returns the ports that could not be opened again; they are closed now.

        Raises:
            StartError: gvproxy does not come up.
            PortError: ssh's or podman's own way could not be opened again.
            GuestError: the guest cannot be led to it, or does not answer by way of it.
        """
        await self.network.begin_again()
        self.helpers_changed()
        # only now: the hypervisor connects to the new gvproxy's socket
        await self.vm.replug(self.sockets.network_card)
        # before anything is reached: these connections went by the gvproxy that has died, and would not say so
        await self.ssh.close()
        await self.clock.close()
        reach = reach and self.profile.engine
        if reach:  # before podman can be reached, its containers' ports are to be heard of again
            await self.network.reopen_port(self.ssh.port)
            await self.ssh.reach()
        lost = await self.network.reopen()
        if reach:
            await self._until_ping()
        return lost

    async def open_again(self, forwards: Iterable[Forward]) -> list[PortError]:
        """Open what was open when the guest was suspended; returns what could not be."""
        lost = []
        for forward in forwards:
            try:
                await self.network.expose(forward)
            except PortError as error:
                lost.append(error)
        return lost

    async def reach_again(self, *, known_ssh_port: int | None) -> None:
        """After a resume, wait until the guest is connected, its clock is set, and podman answers.

        ``known_ssh_port`` is the host's port of sshd that the guest's firewall keeps everybody in it from.

        Raises:
            GuestError: it cannot be reached.
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
        """Open or close what podman announces, within the policy: loopback unless ``-p`` names an address.

        Raises:
            PortError: the port is taken or may not be bound.
        """
        address = check_address("published address", wanted.host_address or self.options.publish_address)
        forward = msgspec.structs.replace(wanted, host_address=address)
        known = self.forwards.get(forward.key)
        if opened:
            if not self.network.keeps(forward):  # podman repeats itself after a restart
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
        """Lead a host port, any free one for 0, to a port of the guest; raises PortError."""
        if host_port == 0:
            return await self.network.pick(guest_port, protocol=protocol, address=address, listed=True)
        forward = Forward(protocol=protocol, host_address=address, host_port=host_port, guest_port=guest_port)
        if not self.network.keeps(forward):
            await self.network.expose(forward)
        return forward

    async def unexport(self, host_port: int, protocol: Protocol, address: str) -> None:
        """Close what :meth:`export` opened; raises PortError."""
        forward = Forward(protocol=protocol, host_address=address, host_port=host_port, guest_port=0)
        known = self.forwards.get(forward.key)
        if known is None or known.purpose != "export":
            exported = ", ".join(f"{f.protocol} {f.local}" for f in self.forwards.values()) or "nothing"
            raise PortError(f"{protocol} port {forward.local} is not exported", hint=f"exported: {exported}")
        await self.network.unexpose(known)

    async def guest_was_reset(self) -> None:
        """Forget what died with the last boot. Containers that start again announce their ports again."""
        await self.ssh.close()  # first: whoever waits for an answer of the old guest must learn that none will come
        await self.clock.close()
        for forward in [f for f in self.forwards.values() if f.purpose == "container"]:
            with contextlib.suppress(PortError):
                await self.network.unexpose(forward)

    async def sync_clock(self) -> ClockSync:
        """Set the guest's clock, and have chrony look at its servers without waiting for it."""
        result = await self.clock.sync()
        log.debug("clock was %s off", spoken(result.offset_before_s))
        return result

    async def settle(self) -> None:
        """What can wait until the machine is ready."""
        await self.profile.let_containers_start(self.ssh)
        try:
            await self.sync_clock()
        except OVMError as error:
            log.warning("the guest's clock could not be set: %s", error.message)
        await self.kick_chrony()

    async def kick_chrony(self) -> None:
        """Best effort: a host without a network has no time servers either."""
        with contextlib.suppress(OVMError):
            await self.clock.kick_chrony()


@contextlib.asynccontextmanager
async def open_session(session: Session) -> AsyncIterator[Session]:
    """Have ``session`` publish what podman announces; its connections are closed on the way out."""
    # before the first connect, which begins with what podman's announcements need
    session.profile.publish(session.ssh, session.publish)
    try:
        yield session
    finally:
        await session.ssh.close()
        await session.clock.close()
