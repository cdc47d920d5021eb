"""A machine's network: a running gvproxy, and the host ports that are forwarded through it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

from ovm.errors import PortError
from ovm.model.ports import Forward, Protocol
from ovm.network import gvproxy
from ovm.network.gvproxy import GUEST_ADDRESS, Gvproxy
from ovm.network.host_ports import LISTENERS, free_port
from ovm.network.open_ports import RUNNING, OpenPorts, Way
from ovm.paths import SocketPaths
from ovm.process.child import Child, Group, at_last
from ovm.process.confine import Rights
from ovm.wire import http
from ovm.wire.error import WireError

log = logging.getLogger(__name__)

ANSWER_S = 10.0
"""A gvproxy whose API is silent for longer hangs."""
PICK_ATTEMPTS = 16

_IN_USE = re.compile(f"address already in use|{RUNNING}")


class Network:
    """A running gvproxy; :func:`start` makes one."""

    def __init__(self, process: Gvproxy, sockets: SocketPaths, api: http.UnixHTTP) -> None:
        self._process = process
        self._sockets = sockets
        self._api = api
        self._ports = OpenPorts(api)

    @property
    def child(self) -> Child:
        """Gvproxy's process."""
        return self._process.child

    @property
    def forwards(self) -> dict[tuple[str, str], Forward]:
        """The listed host ports that are open; one that is to be closed counts until it is."""
        return self._ports.forwards

    def keeps(self, forward: Forward) -> bool:
        """Return whether ``forward`` is open and stays so."""
        return self._ports.keeps(forward)

    async def begin(self) -> None:
        """Start gvproxy; returns when its API answers and the hypervisor can connect.

        Raises:
            HelperExited: it ended before it answered.
            NotReadyError: it was not ready within API_START_S seconds.
        """
        await self._process.begin()
        self._ports.gvproxy_is_up()

    async def begin_again(self) -> None:
        """Start another gvproxy in place of one that has died. Nothing is open through it until :meth:`reopen`.

        Calls that need gvproxy wait meanwhile. Raises as :meth:`begin` and :func:`ovm.network.gvproxy.lay_out` do.
        """
        self._ports.gvproxy_is_down()
        await self.end()
        self._ports.forget_unwanted()
        await asyncio.to_thread(gvproxy.lay_out, self._sockets)
        await self._process.begin()

    async def reopen_port(self, port: int) -> None:
        """Open the host's loopback TCP ``port`` in a new gvproxy, ahead of all others.

        Raises:
            PortError: it cannot be opened.
        """
        await self._ports.reopen_port(port)

    async def reopen(self) -> list[PortError]:
        """Open in a new gvproxy what the last one had open; :meth:`OpenPorts.reopen` has the details.

        Raises:
            PortError: ssh's or podman's own port or socket could not be opened.
        """
        return await self._ports.reopen()

    async def end(self) -> None:
        """End gvproxy; fine if it has ended."""
        await self._process.end()

    async def close(self) -> None:
        """End gvproxy for good; calls that wait for it raise PortError."""
        self._ports.gvproxy_is_up()  # calls that wait for another gvproxy are not to wait for ever
        await self.end()
        await self._ports.end_changes()

    async def answers(self) -> bool:
        """Whether gvproxy's API answers within ANSWER_S seconds."""
        try:
            async with self._api.lines("GET", "/services/forwarder/all", timeout_s=ANSWER_S):
                return True
        except WireError as error:
            return error.status != 0

    async def expose(self, forward: Forward) -> None:
        """Open the host port of ``forward``, and list it. If the caller is cancelled, it is closed again.

        Raises:
            PortError: it is taken, or may not be bound.
        """
        await self._expose(forward, listed=True, is_free=False)

    async def _expose(self, forward: Forward, *, listed: bool, is_free: bool) -> None:
        body = {
            "local": forward.local,
            "remote": f"{GUEST_ADDRESS}:{forward.guest_port}",
            "protocol": forward.protocol,
        }
        try:
            await self._ports.open(Way(body, forward if listed else None), None if is_free else forward)
        except WireError as error:
            raise _port_error(forward, error.message) from error

    async def unexpose(self, forward: Forward) -> None:
        """Close the host port of ``forward``.

        Raises:
            PortError: it was not open, or gvproxy does not answer; it is closed as soon as gvproxy does.
        """
        try:
            await self._ports.close(forward.key)
        except WireError as error:
            raise _port_error(forward, error.message) from error

    async def settle(self) -> None:
        """Close what is open but no longer wanted, because gvproxy did not answer when it was to be closed.

        Raises:
            WireError: gvproxy does not answer.
        """
        await self._ports.settle()

    async def pick(
        self,
        guest_port: int,
        *,
        first: int = 0,
        protocol: Protocol = "tcp",
        address: str = "127.0.0.1",
        listed: bool = False,
    ) -> Forward:
        """Expose ``guest_port`` on a free host port: from ``first`` up, or any if that is 0.

        Each candidate is tried on the very address that gvproxy will bind, and lost races pick again. It is the
        machine's own unless it is to be ``listed``. If the caller is cancelled, it is closed again.

        Raises:
            PortError: none was to be had.
        """
        candidates = range(first, 65536) if first else (0,) * PICK_ATTEMPTS
        for candidate in candidates:
            port = await asyncio.to_thread(free_port, protocol, address, candidate)
            if port is None:
                continue
            forward = Forward(protocol=protocol, host_address=address, host_port=port, guest_port=guest_port)
            try:
                await self._expose(forward, listed=listed, is_free=True)
            except PortError as error:
                if _IN_USE.search(str(error)):
                    continue
                raise
            return forward
        raise PortError(
            f"no {protocol} port of {address} is free" + (f" from {first} up" if first else ""),
            hint=f"see what listens with `{LISTENERS}`",
        )

    async def expose_socket(self, socket_path: Path, guest_port: int) -> None:
        """Let a host unix socket, mode 0600, lead to a TCP port of the guest.

        Raises:
            PortError: it cannot be made.
        """
        await self._expose_path(socket_path, f"tcp://{GUEST_ADDRESS}:{guest_port}")

    async def expose_tunnel(self, socket_path: Path, guest_path: str, key: Path) -> None:
        """Let a host unix socket, mode 0600, lead to one of the guest, over ssh as root with ``key``.

        The connection is made when somebody uses it. gvproxy checks no host key: it reaches the guest over
        its own wire alone.

        Raises:
            PortError: it cannot be made.
        """
        remote = f"ssh-tunnel://root@{GUEST_ADDRESS}:22{quote(guest_path)}?key={quote(str(key))}"
        await self._expose_path(socket_path, remote)

    async def _expose_path(self, socket_path: Path, remote: str) -> None:
        try:
            await self._ports.open(Way({"local": str(socket_path), "remote": remote, "protocol": "unix"}))
        except WireError as error:
            raise PortError(f"{socket_path} cannot be made: {error.message}") from error


@contextlib.asynccontextmanager
async def start(
    group: Group, program: Path, sockets: SocketPaths, log_path: Path, *, wire: gvproxy.Wire, reads: Sequence[Path] = ()
) -> AsyncIterator[Network]:
    """Gvproxy, its API answering and its socket for the hypervisor open; ended on the way out.

    :func:`ovm.network.gvproxy.lay_out` comes first. Of the user's files it may touch its own directory alone, and read
    ``reads``: root in the guest can use its API, and must not reach further.

    Raises:
        HelperExited: it ended before it answered.
        NotReadyError: it was not ready within API_START_S seconds.
    """
    async with http.connect(sockets.network_api) as api:
        command = gvproxy.argv(program, sockets, wire)
        rights = Rights(sockets=[sockets.gvproxy], reads=reads)
        spawn = partial(group.spawn, "gvproxy", command, log_path=log_path, cwd=sockets.gvproxy, rights=rights)
        network = Network(Gvproxy(spawn, sockets, log_path), sockets, api)
        async with at_last(network.close):
            await network.begin()
            yield network


def _port_error(forward: Forward, reason: str) -> PortError:
    hint = ""
    if _IN_USE.search(reason):
        hint = f"see who has {forward.host_port} with `{LISTENERS}`, or let 0 pick a free one"
    elif "permission denied" in reason:
        hint = "ports below 1024 need privileges on this host; choose a higher one"
    return PortError(f"{forward.protocol} port {forward.local}: {reason}", hint=hint)
