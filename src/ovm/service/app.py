"""The REST interface: a table of requests and their handlers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ovm.errors import (
    ExecTimeout,
    FileError,
    GuestError,
    InputError,
    InUseError,
    OptionError,
    OVMError,
    PortError,
    SpaceError,
    StateError,
)
from ovm.model.events import Event
from ovm.model.info import Health, Info
from ovm.model.ports import Forward
from ovm.model.results import ClockSync, Pruned
from ovm.model.states import StateInfo
from ovm.process import logs
from ovm.service import protocol as p
from ovm.service.host import Host
from ovm.wire import codec

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

BODY_MAX_BYTES = 64 << 10
"""Limit of every request except exec."""
EXEC_BODY_MAX_BYTES = 64 << 20
"""Limit of an exec request, which has the command's whole standard input."""
BODY_TIMEOUT_S = 30.0
"""Deadline for a whole body, however slowly the client sends it."""
REQUESTS_MAX = 128
STREAMS_MAX = 64
"""Limit of concurrent streams, which may last for ever: commands, and logs and events that are followed."""
READ_BYTES = 64 * 1024
PIECES_AHEAD = 16
"""Limit of pieces of a command's output that are read before the client takes them."""
SIGNAL_STATUS = 128
NUMBER_MAX_DIGITS = 15
LOG_LINES = 100
LOG_AGAIN_S = 0.25
"""Poll interval of a log that is followed."""

_STATUS: tuple[tuple[type[OVMError], int], ...] = (
    (InputError, 400),
    (StateError, 409),
    (InUseError, 409),
    (PortError, 409),
    (SpaceError, 507),
    (ExecTimeout, 504),
    (GuestError, 502),
    (OVMError, 500),
)
"""The first class that matches sets the status."""
BUSY_STATUS = 503
_BUSY = InUseError("the service has too many requests at once", hint="wait until some of them are done")


@dataclass(frozen=True, slots=True)
class Query:
    """A query parameter."""

    name: str
    kind: Literal["integer", "boolean", "string"]
    about: str


@dataclass(frozen=True, slots=True)
class Verb:
    """A kind of request."""

    method: Literal["GET", "POST"]
    path: str
    summary: str
    call: Callable[..., Awaitable[Any]]
    """Handler, called with the host and the decoded body, or with the request if there are ``queries``."""
    body: type[Any] | None = None
    answer: Any = None
    media_type: str = "application/json"
    queries: tuple[Query, ...] = ()
    body_max_bytes: int = BODY_MAX_BYTES


async def _status(host: Host) -> p.Status:
    return await asyncio.to_thread(host.status)  # in a thread, because it reads the settings


async def _info(host: Host) -> Info:
    return host.machine.info


async def _state(host: Host) -> StateInfo:
    return await host.machine.vm_state()


async def _health(host: Host) -> Health:
    return await host.machine.check_health()


async def _pause(host: Host) -> StateInfo:
    await host.machine.vm_pause()
    return await _state(host)


async def _resume(host: Host) -> StateInfo:
    await host.machine.vm_resume()
    return await _state(host)


async def _stop(host: Host, wanted: p.Stop) -> p.Stopped:
    await host.stop(force=wanted.force, timeout_s=wanted.timeout_s)
    return p.Stopped()


async def _suspend(host: Host, wanted: p.Suspend) -> p.Stopped:
    await host.suspend(timeout_s=wanted.timeout_s)
    return p.Stopped()


async def _reset(host: Host, wanted: p.Reset) -> StateInfo:
    await host.reset(data=wanted.data)
    return await _state(host)


async def _clocksync(host: Host) -> ClockSync:
    return await host.machine.clocksync()


async def _ports(host: Host) -> tuple[Forward, ...]:
    return host.machine.ports()


async def _export(host: Host, wanted: p.PortWanted) -> Forward:
    return await host.machine.export_port(
        wanted.host_port, wanted.guest_port, protocol=wanted.protocol, address=wanted.address
    )


async def _unexport(host: Host, wanted: p.PortUnwanted) -> None:
    await host.machine.unexport_port(wanted.host_port, protocol=wanted.protocol, address=wanted.address)


async def _prune(host: Host, wanted: p.Prune) -> Pruned:
    return await host.machine.prune(everything=wanted.everything, volumes=wanted.volumes)


async def _exec(host: Host, wanted: p.Exec) -> AsyncIterator[bytes]:
    if not wanted.argv:
        raise OptionError("argv is empty", hint='use a shell: ["sh", "-c", "…"]')
    if any("\0" in word for word in (*wanted.argv, *wanted.environment, *wanted.environment.values())):
        raise OptionError("argv and environment cannot contain a NUL")
    stack = contextlib.AsyncExitStack()
    process = await stack.enter_async_context(host.machine.process(wanted.argv, environment=wanted.environment or None))
    return _pieces(stack, process, wanted)


async def _pieces(stack: contextlib.AsyncExitStack, process: Any, wanted: p.Exec) -> AsyncIterator[bytes]:
    """Yield the command's output as it comes. The command is ended when the client disconnects."""
    queue: asyncio.Queue[p.Piece | None] = asyncio.Queue(PIECES_AHEAD)

    async def read(name: str, reader: Any) -> None:
        while chunk := await reader.read(READ_BYTES):
            await queue.put(p.Piece(**{name: chunk}))

    async def run() -> None:
        try:
            async with asyncio.timeout(wanted.timeout_s):
                with contextlib.suppress(OSError):  # it may have ended without reading anything
                    process.stdin.write(wanted.stdin)
                    process.stdin.write_eof()
                async with asyncio.TaskGroup() as reading:
                    reading.create_task(read("stdout", process.stdout))
                    reading.create_task(read("stderr", process.stderr))
                status = (await process.wait()).returncode
            if status is None:
                raise GuestError("the connection to the guest was lost before the command ended")
            await queue.put(p.Piece(exit_status=SIGNAL_STATUS - status if status < 0 else status))
        except TimeoutError:
            await queue.put(p.Piece(error=ExecTimeout(f"the command ran longer than {wanted.timeout_s:g} s")))
        except OVMError as error:
            await queue.put(p.Piece(error=error))
        except Exception as error:  # noqa: BLE001 - of asyncssh or the task group, when the guest goes down
            lost = GuestError(f"the connection to the guest was lost: {error}")
            await queue.put(p.Piece(error=lost))
        await queue.put(None)

    running = asyncio.create_task(run())
    try:
        async with stack:
            while (piece := await queue.get()) is not None:
                yield codec.encode(piece) + b"\n"
    finally:
        running.cancel()


async def _events(host: Host, request: Request) -> AsyncIterator[bytes]:
    last = request.headers.get("last-event-id") or request.query_params.get("after")
    return _server_sent(host, _number("after", last, default=0), follow=_flag(request, "follow", default=True))


async def _server_sent(host: Host, after: int, *, follow: bool) -> AsyncIterator[bytes]:
    if not follow:
        for told in host.history.known(after):
            yield _sent(told)
        return
    async for told in host.history.follow(after):
        yield _sent(told)


def _sent(told: Event) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (told.id, told.name.encode(), codec.encode(told))


def _number(name: str, value: str | None, *, default: int) -> int:
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal()) or len(value) > NUMBER_MAX_DIGITS:
        raise OptionError(f"{name}={value!r} is not a number of 0 or more")
    return int(value)


def _flag(request: Request, name: str, *, default: bool) -> bool:
    value = request.query_params.get(name)
    if value is None:
        return default
    if value not in {"true", "false"}:
        raise OptionError(f"{name}={value!r} is neither true nor false")
    return value == "true"


async def _logs(host: Host) -> dict[str, str]:
    return {name: str(path) for name, path in (await asyncio.to_thread(host.logs)).items()}


async def _log(host: Host, request: Request) -> AsyncIterator[bytes]:
    there = await asyncio.to_thread(host.logs)
    name = request.query_params.get("name", "console")
    lines = _number("lines", request.query_params.get("lines"), default=LOG_LINES)
    follow = _flag(request, "follow", default=False)
    if name not in there:
        raise OptionError(f"no log is called {name!r}", hint=f"use one of: {', '.join(there)}")
    try:
        return _read(await asyncio.to_thread(logs.Reader, there[name], lines), follow=follow)
    except OSError as error:
        raise FileError(f"{there[name]} cannot be read: {error.strerror or error}") from error


async def _read(reader: logs.Reader, *, follow: bool) -> AsyncIterator[bytes]:
    with reader:
        while (more := await asyncio.to_thread(reader.more)) or follow:
            yield _text(more)
            if not more:
                await asyncio.sleep(LOG_AGAIN_S)
        yield _text(reader.rest())


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


VERBS: tuple[Verb, ...] = (
    Verb("GET", "/v1/status", "Return the status of machine and service, in every state.", _status, answer=p.Status),
    Verb("GET", "/v1/info", "Return the machine's addresses and configuration.", _info, answer=Info),
    Verb("GET", "/v1/state", "Query the hypervisor for the state and possible transitions.", _state, answer=StateInfo),
    Verb("GET", "/v1/health", "Check the machine's health now.", _health, answer=Health),
    Verb("POST", "/v1/pause", "Pause the machine.", _pause, answer=StateInfo),
    Verb("POST", "/v1/resume", "Resume the machine and set the guest's clock.", _resume, answer=StateInfo),
    Verb("POST", "/v1/stop", "Shut the guest down and end the service.", _stop, p.Stop, p.Stopped),
    Verb(
        "POST",
        "/v1/suspend",
        "Save the machine's state for the next start and end the service.",
        _suspend,
        p.Suspend,
        p.Stopped,
    ),
    Verb("POST", "/v1/reset", "Stop the machine, restore its files and start it again.", _reset, p.Reset, StateInfo),
    Verb("POST", "/v1/clocksync", "Set the guest's clock to the host's.", _clocksync, answer=ClockSync),
    Verb("GET", "/v1/ports", "List the host ports forwarded to the guest.", _ports, answer=tuple[Forward, ...]),
    Verb("POST", "/v1/ports/add", "Forward a host port to a guest port.", _export, p.PortWanted, Forward),
    Verb("POST", "/v1/ports/remove", "Remove the forward of a host port.", _unexport, p.PortUnwanted),
    Verb(
        "POST",
        "/v1/exec",
        "Run a command as root in the guest; return a line of JSON for each piece of output.",
        _exec,
        p.Exec,
        p.Piece,
        "application/x-ndjson",
        body_max_bytes=EXEC_BODY_MAX_BYTES,
    ),
    Verb("POST", "/v1/prune", "Delete unused podman data.", _prune, p.Prune, Pruned),
    Verb("GET", "/v1/logs", "List the machine's logs: name and file.", _logs, answer=dict[str, str]),
    Verb(
        "GET",
        "/v1/log",
        "Return the end of a log.",
        _log,
        answer=str,
        media_type="text/plain",
        queries=(
            Query("name", "string", "Name of the log; default console, the guest's own."),
            Query("lines", "integer", f"Number of last lines; default {LOG_LINES}."),
            Query("follow", "boolean", "Continue with new lines; default false."),
        ),
    ),
    Verb(
        "GET",
        "/v1/events",
        "Return past and new events as server-sent events; Last-Event-ID resumes after that event.",
        _events,
        answer=Event,
        media_type="text/event-stream",
        queries=(
            Query("after", "integer", "Begin after the event with this number."),
            Query("follow", "boolean", "Continue with new events; default true."),
        ),
    ),
)


def app(host: Host, openapi: Callable[[], dict[str, Any]]) -> Starlette:
    """Return the application that serves ``host``."""

    async def document(_request: Request) -> Response:
        return _json(openapi())

    routes = [Route(verb.path, partial(_answer, host, verb), methods=[verb.method]) for verb in VERBS]
    routes.append(Route("/v1/openapi.json", document))
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Bounded)],
        exception_handlers={
            OVMError: _failed,
            HTTPException: _unknown,
            ClientDisconnect: _hung_up,
            Exception: _unexpected,
        },
    )


class _Bounded:
    """Limits concurrent requests, so that a runaway script cannot take the machine down."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._at_once = {True: 0, False: 0}
        self._streams = frozenset(verb.path for verb in VERBS if verb.media_type != "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_stream = scope["path"] in self._streams
        if sum(self._at_once.values()) >= REQUESTS_MAX or (is_stream and self._at_once[True] >= STREAMS_MAX):
            await _json(p.Problem(error=_BUSY.as_dict()), BUSY_STATUS)(scope, receive, send)
            return
        self._at_once[is_stream] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._at_once[is_stream] -= 1


async def _answer(host: Host, verb: Verb, request: Request) -> Response:
    if verb.queries:
        result = await verb.call(host, request)
    elif verb.body is not None:
        result = await verb.call(host, await _decoded(request, verb))
    else:
        result = await verb.call(host)
    if isinstance(result, AsyncIterator):
        return StreamingResponse(result, media_type=verb.media_type)
    return _json(result)


async def _decoded(request: Request, verb: Verb) -> Any:
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                content += piece
                if len(content) > verb.body_max_bytes:
                    raise OptionError(f"the request's body has more than {verb.body_max_bytes} bytes")
    except TimeoutError as error:
        raise OptionError(f"the request's body was not complete within {BODY_TIMEOUT_S:g} s") from error
    try:
        return msgspec.json.decode(bytes(content) or b"{}", type=verb.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f"the request's body is invalid: {error}", hint="see /v1/openapi.json") from error


def _json(result: Any, status: int = 200) -> Response:
    return Response(codec.encode(result), status, media_type="application/json")


async def _failed(_request: Request, error: Exception) -> Response:
    assert isinstance(error, OVMError)
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    return _json(p.Problem(error=error.as_dict()), status)


async def _hung_up(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # the client is gone


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    answer = _json(p.Problem(error={"code": "unknown-request", "message": message}), error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _unexpected(_request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return _json(p.Problem(error={"code": "internal", "message": f"{type(error).__name__}: {error}"}), 500)
