"""``ovm.connect``: control a machine that its service runs, with the methods of :class:`ovm.OVM`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ovm.errors import GuestError, OptionError, OVMError
from ovm.guest.ssh import COLLECTED_MAX_BYTES, Collected
from ovm.model.defaults import STOP_TIMEOUT_S, SUSPEND_TIMEOUT_S
from ovm.model.events import Event, Events, Listener
from ovm.model.info import Health, Info
from ovm.model.ports import Forward, Protocol
from ovm.model.results import ClockSync, ExecResult, Pruned
from ovm.model.states import StateInfo
from ovm.model.validation import check_seconds
from ovm.service import client
from ovm.service import protocol as p
from ovm.wire import http
from ovm.wire.error import WireError

if TYPE_CHECKING:
    from ovm.model.events import EventName

T = TypeVar("T")

REACH_AGAIN_S = 0.5
"""Delay before a lost stream of events is resumed."""
EXEC_MARGIN_S = 30.0
"""Extra time for the service to end a command that exceeded its timeout."""


class RemoteOVM:
    """A machine that its service runs; :func:`ovm.connect` returns one.

    Methods work as those of :class:`OVM` and raise the same errors, and ``StateError`` if the service has ended.
    """

    def __init__(
        self, name: str, socket_path: Path, api: http.UnixHTTP, close: contextlib.AsyncExitStack, status: p.Status
    ) -> None:
        self.name = name
        self._socket_path = socket_path
        self.service_version = status.version
        """Version of ovm that the service runs; it may be older than this one."""
        self._api = api
        self._close = close
        self._events = Events()
        self._listening: asyncio.Task[None] | None = None
        self._last = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection. The machine keeps running."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        await self._close.aclose()

    async def status(self) -> p.Status:
        """Return the status of the machine and its service, in every state."""
        return await self._get("/v1/status", p.Status)

    async def info(self) -> Info:
        """Return the machine's addresses and configuration."""
        return await self._get("/v1/info", Info)

    async def vm_state(self) -> StateInfo:
        """Query the hypervisor for the state and the possible transitions."""
        return await self._get("/v1/state", StateInfo)

    async def check_health(self) -> Health:
        """Check the machine's health now."""
        return await self._get("/v1/health", Health, timeout_s=client.CHANGE_TIMEOUT_S)

    async def vm_pause(self) -> None:
        """Pause the machine; does nothing if it is paused."""
        await self._post("/v1/pause", {}, StateInfo)

    async def vm_resume(self) -> None:
        """Resume the machine and set the guest's clock; does nothing if it runs."""
        await self._post("/v1/resume", {}, StateInfo)

    async def stop(self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut the guest down; its service ends, too."""
        wanted = p.Stop(force=force, timeout_s=check_seconds("timeout_s", timeout_s))
        await self._post("/v1/stop", wanted, p.Stopped, timeout_s=timeout_s + client.STOP_MARGIN_S)

    async def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Save the machine's state on disk for the next start to resume; its service ends, too."""
        wanted = p.Suspend(timeout_s=check_seconds("timeout_s", timeout_s))
        await self._post("/v1/suspend", wanted, p.Stopped, timeout_s=timeout_s + client.STOP_MARGIN_S)

    async def reset_path(self, *, data: bool = False) -> None:
        """Stop the machine, restore its files (with ``data`` also the data disk), and start it again."""
        await self._post("/v1/reset", p.Reset(data=data), StateInfo, timeout_s=client.START_TIMEOUT_S)

    async def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, and verify it."""
        return await self._post("/v1/clocksync", {}, ClockSync)

    async def ports(self) -> tuple[Forward, ...]:
        """List the host ports that are forwarded to the guest."""
        return await self._get("/v1/ports", tuple[Forward, ...])

    async def export_port(
        self, host_port: int, guest_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1"
    ) -> Forward:
        """Forward a host port to a guest port; 0 picks a free host port. Returns the forward."""
        wanted = p.PortWanted(host_port=host_port, guest_port=guest_port, protocol=protocol, address=address)
        return await self._post("/v1/ports/add", wanted, Forward)

    async def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Remove a forward of :meth:`export_port`."""
        unwanted = p.PortUnwanted(host_port=host_port, protocol=protocol, address=address)
        await self._post("/v1/ports/remove", unwanted, type(None))

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        on_stdout: Callable[[bytes], object] | None = None,
        on_stderr: Callable[[bytes], object] | None = None,
        max_output_bytes: int | None = COLLECTED_MAX_BYTES,
    ) -> ExecResult:
        """Run a command as root in the guest; see :meth:`OVM.exec`."""
        if isinstance(argv, str) or not argv:
            raise OptionError("argv is the list of a command and its arguments", hint='use a shell: ["sh", "-c", "…"]')
        wanted = p.Exec(argv=list(argv), stdin=stdin, environment=dict(environment or {}), timeout_s=timeout_s)
        if timeout_s is not None:
            check_seconds("timeout_s", timeout_s)
        collected = Collected(argv, max_output_bytes)
        take_stdout, take_stderr = on_stdout or collected.stdout, on_stderr or collected.stderr
        limit = None if timeout_s is None else timeout_s + EXEC_MARGIN_S
        begins = self._api.lines("POST", "/v1/exec", wanted, timeout_s=client.CHANGE_TIMEOUT_S)
        try:
            async with asyncio.timeout(limit), begins as lines:
                async for line in lines:
                    piece = client.decoded(line, p.Piece, "/v1/exec")
                    if piece.error is not None:
                        raise piece.error
                    if piece.exit_status is not None:
                        return ExecResult(piece.exit_status, *collected.whole)
                    for content, take in ((piece.stdout, take_stdout), (piece.stderr, take_stderr)):
                        if content:
                            take(content)
        except WireError as error:
            raise await self._failure(error, "/v1/exec") from error
        except TimeoutError as error:
            raise GuestError(f"the service of {self.name} stopped answering during the command") from error
        raise GuestError("the service ended before the command did")

    async def prune(self, *, everything: bool = False, volumes: bool = False) -> Pruned:
        """Delete unused podman data, and return the space to the host."""
        wanted = p.Prune(everything=everything, volumes=volumes)
        return await self._post("/v1/prune", wanted, Pruned, timeout_s=client.START_TIMEOUT_S)

    async def logs(self) -> dict[str, Path]:
        """Return the paths of the logs, by name: ``console`` is the guest's own."""
        told = await self._get("/v1/logs", dict[str, str])
        return {name: Path(path) for name, path in told.items()}

    def on(self, name: EventName, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` at each event of that name from now on; returns a function that removes it."""
        remove = self._events.on(name, listener)
        self._listen()
        return remove

    def events(self) -> AsyncIterator[Event]:
        """Iterate over the events from this call on, in order; each iterator has its own queue.

        The last event is ``close``, because the service then ends. If the service is killed, the events are ``error``
        and ``close``.
        """
        self._listen()
        return self._events.stream()

    async def history(self, *, after: int = 0) -> list[Event]:
        """Return the past events after number ``after``, including the steps of starts and stops."""
        path = f"/v1/events?after={after}&follow=false"
        try:
            async with asyncio.timeout(client.ANSWER_TIMEOUT_S), self._api.lines("GET", path) as lines:
                return [told async for told in _told(lines, path)]
        except WireError as error:
            raise await self._failure(error, path) from error

    def _listen(self) -> None:
        if self._listening is None:
            self._listening = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        """Emit events until the service ends; a lost stream is resumed after the last event.

        If the service was killed, listeners get ``error`` and ``close``, as when a machine fails.
        """
        is_up = True
        while True:
            path = f"/v1/events?after={self._last}"
            try:
                async with self._api.lines("GET", path) as lines:
                    async for told in _told(lines, path):
                        self._last, is_up = told.id, told.name != "close"
                        if told.name != "step":
                            self._events.emit(told.name, told.error, health=told.health)
            except WireError as error:
                lost = await self._failure(error, path)
            except OVMError as error:
                lost = error
            else:
                return
            if not isinstance(lost, GuestError):
                break
            await asyncio.sleep(REACH_AGAIN_S)
        if is_up:
            self._events.emit("error", lost)
            self._events.emit("close")

    async def _get(self, path: str, kind: type[T], *, timeout_s: float = client.ANSWER_TIMEOUT_S) -> T:
        try:
            return await self._api.get(path, kind, timeout_s=timeout_s)
        except WireError as error:
            raise await self._failure(error, path) from error

    async def _post(self, path: str, body: Any, kind: type[T], *, timeout_s: float = client.CHANGE_TIMEOUT_S) -> T:
        try:
            content = await self._api.post(path, body, timeout_s=timeout_s)
        except WireError as error:
            raise await self._failure(error, path) from error
        return client.decoded(content, kind, path)

    async def _failure(self, error: WireError, path: str) -> OVMError:
        if error.content:
            return client.failure(error.content, path)
        return await asyncio.to_thread(client.lost, self.name, self._socket_path, error)


async def connect(name: str = "default") -> RemoteOVM:
    """Connect to the running machine ``name``, which ``ovm start`` or another program has started.

    Raises:
        StateError: no service runs the machine.
        SkewError: the service runs an incompatible version of ovm.
    """
    from ovm.registry import machines

    found = await asyncio.to_thread(machines.find, name)
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(http.connect(found.service_socket))
        try:
            content = await api.text("/v1/status")
        except WireError as error:
            raise await asyncio.to_thread(client.lost, name, found.service_socket, error) from error
        status = client.checked_status(name, content.encode())
        remote = RemoteOVM(name, found.service_socket, api, stack.pop_all(), status)
    remote._last = max((told.id for told in await remote.history()), default=0)
    return remote


async def _told(lines: AsyncIterator[bytes], path: str) -> AsyncIterator[Event]:
    async for line in lines:
        if line.startswith(b"data: "):
            yield client.decoded(line.removeprefix(b"data: "), Event, path)
