"""The guest's network: a gvproxy, driven over its HTTP API, and what is open through it.

The :class:`Network` owns what is open through it: it opens another gvproxy's ports in place of one that died, and
closes what is no longer wanted once gvproxy can be asked.

Facts from gvproxy 0.8.9, run: its exit status is 0 for runtime errors too, so "it ended" is the failure; a
forwarded port accepts connections before there is a guest, so accepting is no sign of readiness; attached to
QEMU it leaves on SIGTERM only after QEMU has gone, so the machine ends first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from ovm.errors import FileError, PortError
from ovm.model.ports import Forward, Protocol, join
from ovm.paths import SocketPaths
from ovm.process.child import Child, Group
from ovm.process.confine import Rights
from ovm.process.supervise import race
from ovm.trust import directories
from ovm.wire import http
from ovm.wire.error import WireError

log = logging.getLogger(__name__)

GUEST_ADDRESS = "192.168.127.2"
GATEWAY_ADDRESS = "192.168.127.1"
HOST_ALIAS = "192.168.127.254"
"""What the guest calls the host's loopback."""
GUEST_MAC = "5a:94:ef:e4:0c:ee"
"""gvproxy's static lease for GUEST_ADDRESS."""
MTU = 1500

API_START_S = 30.0
"""A first start on macOS waits for Gatekeeper."""
CONNECT_RETRY_S = 0.005
END_GRACE_S = 2.0
ANSWER_S = 10.0
"""A gvproxy whose API is silent for longer hangs."""
PICK_ATTEMPTS = 16

Wire = Literal["qemu", "vfkit", "channel"]
"""How the guest's frames arrive: QEMU's stream, vfkit's datagrams, or from the guest itself, over a channel."""

LISTENERS = "lsof -nP -i" if sys.platform == "darwin" else "ss -lnptu"
"""What shows who listens where."""

_RUNNING = "proxy already running"
_NOT_FOUND = "proxy not found"
_IN_USE = re.compile(f"address already in use|{_RUNNING}")


@dataclass(slots=True, eq=False)
class _Way:
    """A host port or socket that gvproxy is to open, has opened, or is to close."""

    body: dict[str, str]
    """The request that opens it."""
    forward: Forward | None = None
    """What is listed of it; ``None`` if it is the machine's own."""
    is_open: bool = False
    """Whether gvproxy has said so."""
    wanted: bool = True
    """If not, it is closed as soon as gvproxy can be asked."""

    @property
    def key(self) -> tuple[str, str]:
        """By protocol and the host's end."""
        return self.body["protocol"], self.body["local"]


def argv(program: Path, sockets: SocketPaths, wire: Wire) -> list[str]:
    """Gvproxy's command line. ``-ssh-port -1``: sshd is exposed by us, so that a taken port is only picked again."""
    api, card = (sockets.made_by_gvproxy(link) for link in (sockets.network_api, sockets.network_card))
    listen_to_card = {
        "qemu": ("-listen-qemu", f"unix://{card}"),
        "vfkit": ("-listen-vfkit", f"unixgram://{card}"),
        "channel": ("-listen", f"unix://{card}"),
    }
    return [
        str(program),
        "-mtu", str(MTU),
        "-ssh-port", "-1",
        "-listen", f"unix://{api}",
        *listen_to_card[wire],
    ]  # fmt: skip


class Network:
    """A running gvproxy; :func:`start` makes one."""

    def __init__(
        self, spawn: Callable[[], Awaitable[Child]], sockets: SocketPaths, log_path: Path, api: http.UnixHTTP
    ) -> None:
        self._spawn = spawn
        self._sockets = sockets
        self._log_path = log_path
        self._api = api
        self._child: Child | None = None
        self._ways: dict[tuple[str, str], _Way] = {}
        """What is open, or may be."""
        self._up = asyncio.Event()
        self._lock = asyncio.Lock()
        """Held by the one change of what is open that gvproxy is asked for."""
        self._changes: set[asyncio.Task[None]] = set()

    @property
    def child(self) -> Child:
        """Gvproxy's process."""
        assert self._child is not None
        return self._child

    @property
    def forwards(self) -> dict[tuple[str, str], Forward]:
        """The listed host ports that are open, those that are to be closed but are not yet among them."""
        return {key: way.forward for key, way in self._ways.items() if way.forward is not None and way.is_open}

    def keeps(self, forward: Forward) -> bool:
        """Whether ``forward`` is open and is to stay so."""
        way = self._ways.get(forward.key)
        return way is not None and way.is_open and way.wanted and way.forward == forward

    async def begin(self) -> None:
        """Start gvproxy; returns when its API answers.

        Raises:
            HelperExited: it ended before it answered.
            NotReadyError: it did not answer within API_START_S seconds.
        """
        await self._begin()
        self._up.set()

    async def _begin(self) -> None:
        self._child = await self._spawn()
        await race(
            _answers(self._sockets.network_api),
            [self.child],
            stage="network",
            timeout_s=API_START_S,
            evidence=self._log_path,
            hint="on macOS, Gatekeeper may be asking whether gvproxy may run",
        )

    async def begin_again(self) -> None:
        """Start another gvproxy in place of one that has died; until :meth:`reopen` nothing is open through it.

        Calls that need gvproxy wait meanwhile. Raises as :meth:`begin` and :func:`lay_out` do.
        """
        self._up.clear()
        await self.end()
        self._ways = {key: way for key, way in self._ways.items() if way.wanted}  # the others are closed now
        await asyncio.to_thread(lay_out, self._sockets)
        await self._begin()

    async def reopen_port(self, port: int) -> None:
        """Open the host's loopback ``port``, which was open before, ahead of all others.

        Raises:
            PortError: it cannot be opened.
        """
        try:
            await self._request(self._ways["tcp", join("127.0.0.1", port)].body)
        except WireError as error:
            raise PortError(f"tcp port {port} could not be opened again: {error.message}") from error

    async def reopen(self) -> list[PortError]:
        """Open what was open before.

        Returns why listed ports could not be: somebody took them meanwhile, for one. They are closed now.

        Raises:
            PortError: ssh's or podman's own way could not be opened.
        """
        lost: list[PortError] = []
        own: list[PortError] = []
        for key, way in tuple(self._ways.items()):
            if not way.wanted:
                continue
            try:
                await self._request(way.body)
            except WireError as error:
                if _RUNNING in error.message:  # it was opened ahead
                    continue
                way.wanted = way.forward is None  # another gvproxy may be able to open the machine's own
                (own if way.wanted else lost).append(
                    PortError(f"{key[0]} {key[1]} could not be opened again: {error.message}")
                )
        with contextlib.suppress(WireError):  # else at the next change
            await self._close_unwanted()  # among them what was closed while it was being opened again
        self._up.set()
        if own:
            raise own[0]
        return lost

    async def end(self) -> None:
        """End gvproxy; fine if it has ended."""
        if self._child is not None:
            await self._child.end(grace_s=END_GRACE_S)

    async def close(self) -> None:
        """End gvproxy for good; calls that wait for it raise PortError."""
        self._up.set()  # calls that wait for another gvproxy are not to wait for ever
        await self.end()
        if self._changes:
            _, pending = await asyncio.wait(self._changes, timeout=END_GRACE_S)
            for task in pending:
                task.cancel()

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
            await self._open(_Way(body, forward if listed else None), None if is_free else forward)
        except WireError as error:
            raise _port_error(forward, error.message) from error

    async def unexpose(self, forward: Forward) -> None:
        """Close the host port of ``forward``.

        Raises:
            PortError: it was not open, or gvproxy does not answer; it is closed as soon as gvproxy does.
        """
        if (way := self._ways.get(forward.key)) is None:
            raise _port_error(forward, _NOT_FOUND)
        way.wanted = False
        if not self._up.is_set():  # it went with the last gvproxy, and the next one is not asked for it
            way.is_open = False
            return
        try:
            await self.settle()
        except WireError as error:
            raise _port_error(forward, error.message) from error

    async def settle(self) -> None:
        """Close what is open although it is not wanted: gvproxy did not answer when it was to be closed.

        Raises:
            WireError: gvproxy does not answer.
        """
        if any(not way.wanted for way in self._ways.values()):
            await asyncio.shield(self._start(self._settle()))

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
            await self._open(_Way({"local": str(socket_path), "remote": remote, "protocol": "unix"}))
        except WireError as error:
            raise PortError(f"{socket_path} cannot be made: {error.message}") from error

    async def _open(self, way: _Way, to_probe: Forward | None = None) -> None:
        try:
            await asyncio.shield(self._start(self._open_in_turn(way, to_probe)))
        except asyncio.CancelledError:
            way.wanted = False
            self._start(self._settle())
            raise

    async def _open_in_turn(self, way: _Way, to_probe: Forward | None) -> None:
        async with self._turn():
            await self._close_unwanted()  # it may be on the very port
            if to_probe is not None and not await asyncio.to_thread(
                can_bind, to_probe.protocol, to_probe.host_address, to_probe.host_port
            ):
                raise WireError("address already in use")
            if way.key in self._ways:
                raise WireError(_RUNNING)
            if not way.wanted:
                return
            self._ways[way.key] = way
            try:
                await self._request(way.body)
            except WireError as error:
                way.wanted = False  # without an answer it may be open all the same
                if error.status:
                    self._forget(way)
                raise
            way.is_open = True

    async def _settle(self) -> None:
        async with self._turn():
            await self._close_unwanted()

    async def _close_unwanted(self) -> None:
        for way in tuple(self._ways.values()):
            if way.wanted:
                continue
            protocol, local = way.key
            try:
                await self._api.post("/services/forwarder/unexpose", {"local": local, "protocol": protocol})
            except WireError as error:
                if not error.status:
                    raise
                if _NOT_FOUND not in error.message:  # gvproxy has forgotten it all the same
                    log.warning("%s %s was not closed properly: %s", protocol, local, error.message)
            self._forget(way)

    def _forget(self, way: _Way) -> None:
        if self._ways.get(way.key) is way:
            del self._ways[way.key]

    def _start(self, change: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``change`` to its end, even if its caller is cancelled: gvproxy may obey a request that is cut off."""
        task = asyncio.create_task(change, name="change of open ports")
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return task

    def _changed(self, task: asyncio.Task[None]) -> None:
        self._changes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("gvproxy: %s", error)  # which its caller, if it is still there, is told as well

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """While inside, gvproxy is up and is asked for no other change."""
        try:
            async with asyncio.timeout(API_START_S):
                await self._up.wait()
                await self._lock.acquire()
        except TimeoutError:
            raise WireError(f"gvproxy has been down for {API_START_S:g} s") from None
        try:
            yield
        finally:
            self._lock.release()

    async def _request(self, body: dict[str, str]) -> None:
        await self._api.post("/services/forwarder/expose", body)
        if body["protocol"] == "unix":
            try:
                await asyncio.to_thread(Path(body["local"]).chmod, 0o600)  # 0700 until here, under our umask
            except OSError as error:
                raise WireError(f"gvproxy says that it is there, but: {error.strerror}") from error


@contextlib.asynccontextmanager
async def start(
    group: Group, program: Path, sockets: SocketPaths, log_path: Path, *, wire: Wire, reads: Sequence[Path] = ()
) -> AsyncIterator[Network]:
    """Gvproxy with its API answering; ended on the way out.

    :func:`lay_out` comes first. Of the user's files it may touch its own directory alone, and read ``reads``: root in
    the guest can use its API, and must not reach further.

    Raises:
        HelperExited: it ended before it answered.
        NotReadyError: it did not answer within API_START_S seconds.
    """
    async with http.connect(sockets.network_api) as api:
        command = argv(program, sockets, wire)
        rights = Rights(sockets=[sockets.gvproxy], reads=reads)
        spawn = partial(group.spawn, "gvproxy", command, log_path=log_path, cwd=sockets.gvproxy, rights=rights)
        network = Network(spawn, sockets, log_path, api)
        try:
            await network.begin()
            yield network
        finally:
            await network.close()


def lay_out(sockets: SocketPaths) -> None:
    """Make gvproxy's directory, without a socket in it, and the links that lead to its sockets.

    Raises:
        FileError: it cannot be made, or holds more than sockets.
    """
    if sockets.gvproxy.is_symlink():
        raise FileError(f"{sockets.gvproxy} is a link", hint="remove it")
    try:
        with contextlib.suppress(FileExistsError):
            sockets.gvproxy.mkdir(mode=0o700)
        directories.make(sockets.gvproxy, private=True)
        for path in sockets.left_by_gvproxy():
            path.unlink()
        for link in (sockets.network_api, sockets.network_card, sockets.podman):
            _link(link, sockets.made_by_gvproxy(link).relative_to(sockets.directory))
        others = [path.name for path in sockets.gvproxy.iterdir()]
    except OSError as error:
        raise FileError(f"{sockets.gvproxy} cannot be prepared: {error.strerror}") from error
    if others:
        raise FileError(
            f"{sockets.gvproxy} holds {others[0]}, which root in the guest could remove",
            hint="move it elsewhere, or choose another socket_dir",
        )


def _link(link: Path, target: Path) -> None:
    """Leave a link that is right as it is: somebody may be about to connect."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


async def _answers(path: Path) -> None:
    """Until something listens on ``path``. gvproxy 0.8.1 has no way to tell, so it is tried again and again."""
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.sleep(CONNECT_RETRY_S)
        else:
            writer.close()
            return


def can_bind(protocol: Protocol, address: str, port: int) -> bool:
    """Whether the very address could be bound now. A port that only root may bind counts as one."""
    return free_port(protocol, address, port) is not None


def free_port(protocol: Protocol, address: str, port: int) -> int | None:
    """``port`` if it is free on ``address`` now (any free port for 0), else ``None``."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as probe:
        if protocol == "tcp":  # as gvproxy does: a port in TIME_WAIT is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            # for no rights, no such address and the like, let gvproxy's own words tell
            return None if error.errno == errno.EADDRINUSE else port
        chosen: int = probe.getsockname()[1]
        return chosen


def _port_error(forward: Forward, reason: str) -> PortError:
    hint = ""
    if _IN_USE.search(reason):
        hint = f"see who has {forward.host_port} with `{LISTENERS}`, or let 0 pick a free one"
    elif "permission denied" in reason:
        hint = "ports below 1024 need privileges on this host; choose a higher one"
    return PortError(f"{forward.protocol} port {forward.local}: {reason}", hint=hint)
