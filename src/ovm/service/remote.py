"""``ovm.connect``: a machine that another process runs, with the words of one's own."""

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
"""After a stream of events broke off."""
EXEC_MARGIN_S = 30.0
"""The service itself ends a command that runs too long; it is waited for so much longer."""


class RemoteOVM:
    """A machine behind its service; :func:`ovm.connect` makes one.

    What it is asked means what it means for :class:`OVM`. Every call raises ``StateError`` if the service is gone,
    and what the same call of :class:`OVM` raises.
    """

    def __init__(
        self, name: str, socket_path: Path, api: http.UnixHTTP, close: contextlib.AsyncExitStack, status: p.Status
    ) -> None:
        self.name = name
        self._socket_path = socket_path
        self.service_version = status.version
        """Of the package that the service was started from; it may be older than this one."""
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
        """Hang up. The machine goes on."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        await self._close.aclose()

    async def status(self) -> p.Status:
        """What the machine and its service are about, in every state."""
        return await self._get("/v1/status", p.Status)

    async def info(self) -> Info:
        """Where it is reached, and how it runs."""
        return await self._get("/v1/info", Info)

    async def vm_state(self) -> StateInfo:
        """Its state, as the hypervisor tells it now, and what can be asked of it."""
        return await self._get("/v1/state", StateInfo)

    async def check_health(self) -> Health:
        """Look at it now."""
        return await self._get("/v1/health", Health, timeout_s=client.CHANGE_TIMEOUT_S)

    async def vm_pause(self) -> None:
        """Pause its virtual CPUs; fine if they are paused."""
        await self._post("/v1/pause", {}, StateInfo)

    async def vm_resume(self) -> None:
        """Let them run again, and set the guest's clock; fine if they run."""
        await self._post("/v1/resume", {}, StateInfo)

    async def stop(self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut the guest down; its service ends with it."""
        wanted = p.Stop(force=force, timeout_s=check_seconds("timeout_s", timeout_s))
        await self._post("/v1/stop", wanted, p.Stopped, timeout_s=timeout_s + client.STOP_MARGIN_S)

    async def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Save its state to disk, for its next start to resume; its service ends with it."""
        wanted = p.Suspend(timeout_s=check_seconds("timeout_s", timeout_s))
        await self._post("/v1/suspend", wanted, p.Stopped, timeout_s=timeout_s + client.STOP_MARGIN_S)

    async def reset_path(self, *, data: bool = False) -> None:
        """Stop it, restore its files (with ``data`` the data disk, too), and start it again."""
        await self._post("/v1/reset", p.Reset(data=data), StateInfo, timeout_s=client.START_TIMEOUT_S)

    async def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, and verify it."""
        return await self._post("/v1/clocksync", {}, ClockSync)

    async def ports(self) -> tuple[Forward, ...]:
        """What is open on the host for it."""
        return await self._get("/v1/ports", tuple[Forward, ...])

    async def export_port(
        self, host_port: int, guest_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1"
    ) -> Forward:
        """Lead a port of the host, any free one for 0, to a port of the guest; returns what was bound."""
        wanted = p.PortWanted(host_port=host_port, guest_port=guest_port, protocol=protocol, address=address)
        return await self._post("/v1/ports/add", wanted, Forward)

    async def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Close what :meth:`export_port` opened."""
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
            raise OptionError("argv is the list of a command and its arguments", hint='for a shell: ["sh", "-c", "…"]')
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
            raise GuestError(f"the service of {self.name} does not answer any more") from error
        raise GuestError("the service ended before the command did")

    async def prune(self, *, everything: bool = False, volumes: bool = False) -> Pruned:
        """Have podman remove what nothing uses, and give the host back the room."""
        wanted = p.Prune(everything=everything, volumes=volumes)
        return await self._post("/v1/prune", wanted, Pruned, timeout_s=client.START_TIMEOUT_S)

    async def logs(self) -> dict[str, Path]:
        """The files of its logs, by name: ``console`` is the guest's own."""
        told = await self._get("/v1/logs", dict[str, str])
        return {name: Path(path) for name, path in told.items()}

    def on(self, name: EventName, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` at each event of that name from now on; returns what removes it again."""
        remove = self._events.on(name, listener)
        self._listen()
        return remove

    def events(self) -> AsyncIterator[Event]:
        """Every event from this call on, in order; each iterator has a queue of its own.

        There is none after the last ``close``: the service is gone then. One that was killed is an ``error`` and a
        ``close``.
        """
        self._listen()
        return self._events.stream()

    async def history(self, *, after: int = 0) -> list[Event]:
        """What has happened behind the event number ``after``, the steps of starts and stops included."""
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
        """Until the service is gone; a stream that breaks off is resumed behind the last event.

        If the service was killed, listeners get an error and a close, as from a machine of one's own that failed.
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
    """The machine called ``name``, which its service runs: one that ``ovm start`` or another program has started.

    Raises:
        StateError: there is no such service.
        SkewError: it is of a version of ovm that this one does not understand.
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
