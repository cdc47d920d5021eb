"""The ports and sockets that gvproxy has open: one owner, which opens and closes them in turn.

A new gvproxy has nothing open; :meth:`OpenPorts.reopen` opens in it what the last one had. What is no longer wanted is
closed once gvproxy answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovm.errors import PortError
from ovm.model.ports import Forward, join
from ovm.network.gvproxy import API_START_S, END_GRACE_S
from ovm.network.host_ports import can_bind
from ovm.wire import http
from ovm.wire.error import WireError

log = logging.getLogger(__name__)

RUNNING = "proxy already running"
"""gvproxy's words for a port that is open already."""
NOT_FOUND = "proxy not found"
"""gvproxy's words for a port that is not open."""


@dataclass(slots=True, eq=False)
class Way:
    """A host port or socket that gvproxy is to open, has opened, or is to close."""

    body: dict[str, str]
    """The request that opens it."""
    forward: Forward | None = None
    """How it is listed; ``None`` for the machine's own."""
    is_open: bool = False
    """Whether gvproxy has confirmed it."""
    wanted: bool = True
    """If not, it is closed as soon as gvproxy answers."""

    @property
    def key(self) -> tuple[str, str]:
        """The protocol and the host's end."""
        return self.body["protocol"], self.body["local"]


class OpenPorts:
    """What is open through gvproxy, or may be."""

    def __init__(self, api: http.UnixHTTP) -> None:
        self._api = api
        self._ways: dict[tuple[str, str], Way] = {}
        self._up = asyncio.Event()
        self._lock = asyncio.Lock()
        """Held during each request that changes what is open."""
        self._changes: set[asyncio.Task[None]] = set()

    @property
    def forwards(self) -> dict[tuple[str, str], Forward]:
        """The listed host ports that are open; one that is to be closed counts until it is."""
        return {key: way.forward for key, way in self._ways.items() if way.forward is not None and way.is_open}

    def keeps(self, forward: Forward) -> bool:
        """Return whether ``forward`` is open and stays so."""
        way = self._ways.get(forward.key)
        return way is not None and way.is_open and way.wanted and way.forward == forward

    def gvproxy_is_up(self) -> None:
        """Let changes go on that wait for gvproxy."""
        self._up.set()

    def gvproxy_is_down(self) -> None:
        """Make changes wait for another gvproxy."""
        self._up.clear()

    def forget_unwanted(self) -> None:
        """Forget what was to be closed: it was closed with the gvproxy that has ended."""
        self._ways = {key: way for key, way in self._ways.items() if way.wanted}

    async def end_changes(self) -> None:
        """Wait for the changes that are under way, then cancel them."""
        if self._changes:
            _, pending = await asyncio.wait(self._changes, timeout=END_GRACE_S)
            for task in pending:
                task.cancel()

    async def reopen_port(self, port: int) -> None:
        """Open the host's loopback TCP ``port`` in a new gvproxy, ahead of all others.

        Raises:
            PortError: it cannot be opened.
        """
        try:
            await self._request(self._ways["tcp", join("127.0.0.1", port)].body)
        except WireError as error:
            raise PortError(f"tcp port {port} could not be opened again: {error.message}") from error

    async def reopen(self) -> list[PortError]:
        """Open in a new gvproxy what the last one had open.

        Returns the errors of listed ports that could not be opened, for example because another program took one
        meanwhile. They are closed now.

        Raises:
            PortError: a port or socket of the machine's own could not be opened.
        """
        lost: list[PortError] = []
        own: list[PortError] = []
        for key, way in tuple(self._ways.items()):
            if not way.wanted:
                continue
            try:
                await self._request(way.body)
            except WireError as error:
                if RUNNING in error.message:  # reopen_port() opened it
                    continue
                way.wanted = way.forward is None  # another gvproxy may be able to open the machine's own
                (own if way.wanted else lost).append(
                    PortError(f"{key[0]} {key[1]} could not be opened again: {error.message}")
                )
        with contextlib.suppress(WireError):  # else at the next change
            await self._close_unwanted()  # among them what became unwanted during its request
        self.gvproxy_is_up()
        if own:
            raise own[0]
        return lost

    async def open(self, way: Way, to_probe: Forward | None = None) -> None:
        """Open ``way``; if the caller is cancelled, close it again.

        Raises:
            WireError: gvproxy refuses or does not answer, or the host port of ``to_probe`` is taken.
        """
        try:
            await asyncio.shield(self._start(self._open_in_turn(way, to_probe)))
        except asyncio.CancelledError:
            way.wanted = False
            self._start(self._settle())
            raise

    async def close(self, key: tuple[str, str]) -> None:
        """Close what is open under ``key``.

        Raises:
            WireError: it was not open, or gvproxy does not answer; it is closed as soon as gvproxy does.
        """
        if (way := self._ways.get(key)) is None:
            raise WireError(NOT_FOUND)
        way.wanted = False
        if self._up.is_set():
            await self.settle()
        else:
            way.is_open = False  # it was closed with the last gvproxy, and the next one does not open it

    async def settle(self) -> None:
        """Close what is open but no longer wanted, because gvproxy did not answer when it was to be closed.

        Raises:
            WireError: gvproxy does not answer.
        """
        if any(not way.wanted for way in self._ways.values()):
            await asyncio.shield(self._start(self._settle()))

    async def _open_in_turn(self, way: Way, to_probe: Forward | None) -> None:
        async with self._turn():
            await self._close_unwanted()  # it may be on the very port
            if to_probe is not None and not await asyncio.to_thread(
                can_bind, to_probe.protocol, to_probe.host_address, to_probe.host_port
            ):
                raise WireError("address already in use")
            if way.key in self._ways:
                raise WireError(RUNNING)
            if not way.wanted:
                return
            self._ways[way.key] = way
            try:
                await self._request(way.body)
            except WireError as error:
                way.wanted = False  # without an answer it may be open nevertheless
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
                if NOT_FOUND not in error.message:  # gvproxy has forgotten it nevertheless
                    log.warning("%s %s was not closed properly: %s", protocol, local, error.message)
            self._forget(way)

    def _forget(self, way: Way) -> None:
        if self._ways.get(way.key) is way:
            del self._ways[way.key]

    def _start(self, change: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``change`` to its end, even if cancelled: gvproxy may obey a request that is cut off."""
        task = asyncio.create_task(change, name="change of open ports")
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return task

    def _changed(self, task: asyncio.Task[None]) -> None:
        self._changes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("gvproxy: %s", error)  # its caller, if not cancelled, gets the error too

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait until gvproxy is up; inside, no other change is requested."""
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
                await asyncio.to_thread(Path(body["local"]).chmod, 0o600)  # 0700 until here, by our umask
            except OSError as error:
                raise WireError(f"gvproxy reports that it is there, but: {error.strerror}") from error
