"""A blocking client of a service's socket: no event loop, fast to import."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ovm._version import __version__
from ovm.errors import GuestError, OVMError, SkewError, StateError, from_dict
from ovm.model.defaults import STOP_TIMEOUT_S, SUSPEND_TIMEOUT_S
from ovm.model.events import Event
from ovm.model.info import Info
from ovm.model.ports import Forward
from ovm.model.results import ClockSync, Pruned
from ovm.model.states import StateInfo
from ovm.service import protocol as p
from ovm.wire import codec, plain
from ovm.wire.error import WireError

T = TypeVar("T")

ANSWER_TIMEOUT_S = 10.0
"""Timeout of requests that the service answers at once."""
CHANGE_TIMEOUT_S = 120.0
"""Timeout of requests that wait for the hypervisor or the guest."""
STOP_MARGIN_S = 60.0
"""Extra time for a stop beyond the guest's timeout."""
START_TIMEOUT_S = 600.0
"""Timeout of requests that start the machine again or prune."""
ENDING_S = 2.0
"""A service that closed the connection has ended within this time, or still runs."""
LOOK_AGAIN_S = 0.05


class Service:
    """Client of the service of the machine ``name``; each call opens a connection.

    Calls raise :class:`ovm.StateError` if no service runs, :class:`ovm.SkewError` if its version is incompatible, and
    the errors that the service returns.
    """

    def __init__(self, name: str, socket_path: Path) -> None:
        self.name = name
        self._socket_path = socket_path

    def status(self) -> p.Status:
        """Return the status of the machine and its service. Call this first: it checks the service's version.

        Raises:
            StateError: no service runs.
            SkewError: the service runs an incompatible version of ovm.
        """
        with self._asked("GET", "/v1/status", None, ANSWER_TIMEOUT_S) as answer:
            return checked_status(self.name, answer.read())

    def info(self) -> Info:
        """Return the machine's addresses and configuration."""
        return self._get("/v1/info", Info)

    def state(self) -> StateInfo:
        """Query the hypervisor for the machine's state."""
        return self._get("/v1/state", StateInfo)

    def pause(self) -> StateInfo:
        """Pause the machine."""
        return self._post("/v1/pause", None, StateInfo)

    def resume(self) -> StateInfo:
        """Resume the machine."""
        return self._post("/v1/resume", None, StateInfo)

    def stop(self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut the guest down; the service then ends."""
        wanted = p.Stop(force=force, timeout_s=timeout_s)
        self._post("/v1/stop", wanted, p.Stopped, timeout_s=timeout_s + STOP_MARGIN_S)

    def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Save the machine's state on disk; the service then ends."""
        wanted = p.Suspend(timeout_s=timeout_s)
        self._post("/v1/suspend", wanted, p.Stopped, timeout_s=timeout_s + STOP_MARGIN_S)

    def reset(self, *, data: bool = False) -> StateInfo:
        """Stop the machine, restore its files and start it again."""
        return self._post("/v1/reset", p.Reset(data=data), StateInfo, timeout_s=START_TIMEOUT_S)

    def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's."""
        return self._post("/v1/clocksync", None, ClockSync)

    def ports(self) -> list[Forward]:
        """List the host ports that are forwarded to the guest."""
        return self._get("/v1/ports", list[Forward])

    def add_port(self, wanted: p.PortWanted) -> Forward:
        """Forward a host port to a guest port."""
        return self._post("/v1/ports/add", wanted, Forward)

    def remove_port(self, unwanted: p.PortUnwanted) -> None:
        """Remove the forward of a host port."""
        self._post("/v1/ports/remove", unwanted, type(None))

    def prune(self, wanted: p.Prune) -> Pruned:
        """Delete unused podman data."""
        return self._post("/v1/prune", wanted, Pruned, timeout_s=START_TIMEOUT_S)

    def events(self, *, after: int = 0, follow: bool = True, timeout_s: float | None = None) -> Iterator[Event]:
        """Yield the events after number ``after``; with ``follow`` also new events, until the machine is down.

        ``timeout_s`` limits the whole call. With ``None``, following has no limit.

        Raises:
            StateError: the service was killed: it ended without the proper end of the events.
        """
        path = f"/v1/events?after={after}&follow={'true' if follow else 'false'}"
        endless, limit_s = follow and timeout_s is None, ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
        with self._asked("GET", path, None, limit_s, endless=endless) as answer:
            for line in answer.lines():
                if line.startswith(b"data: "):
                    yield decoded(line.removeprefix(b"data: "), Event, path)

    def _get(self, path: str, kind: type[T]) -> T:
        with self._asked("GET", path, None, ANSWER_TIMEOUT_S) as answer:
            return decoded(answer.read(), kind, path)

    def _post(self, path: str, body: Any, kind: type[T], *, timeout_s: float = CHANGE_TIMEOUT_S) -> T:
        content = b"{}" if body is None else msgspec.json.encode(body)
        with self._asked("POST", path, content, timeout_s) as answer:
            return decoded(answer.read(), kind, path)

    @contextmanager
    def _asked(
        self, method: str, path: str, content: bytes | None, timeout_s: float, *, endless: bool = False
    ) -> Iterator[plain.Answer]:
        try:
            with plain.request(
                self._socket_path, method, path, content, timeout_s=timeout_s, endless=endless
            ) as answer:
                if not answer.is_success:
                    raise failure(answer.read(), path)
                yield answer
        except WireError as error:
            raise lost(self.name, self._socket_path, error) from error


class _Version(msgspec.Struct):
    """The fields that the status has in every version of ovm."""

    version: str
    api: int
    pid: int


def checked_status(name: str, content: bytes) -> p.Status:
    """Decode the status and check the service's version.

    Raises:
        SkewError: the version is incompatible.
    """
    hint = f"stop it, then start it again: ovm stop {name}; ovm start {name}"
    try:
        service = decoded(content, _Version, "/v1/status")
    except SkewError as error:
        raise SkewError(error.message, hint=hint) from error
    if service.api != p.API:
        raise SkewError(
            f"the service of {name} runs ovm {service.version}, which is incompatible with ovm {__version__}",
            hint=hint,
        )
    return decoded(content, p.Status, "/v1/status")


def failure(content: bytes, path: str) -> OVMError:
    """Return the error in the service's answer."""
    return from_dict(decoded(content, p.Problem, path).error)


def lost(name: str, socket_path: Path, error: WireError) -> OVMError:
    """Return the error for a failed request. Waits ``ENDING_S`` for a service that closed the connection to end."""
    if any(isinstance(cause, (FileNotFoundError, ConnectionRefusedError)) for cause in _causes(error)):
        return StateError(f"{name} is not running", hint=f"start it: ovm start {name}")
    if not isinstance(error.__cause__, TimeoutError) and _is_gone(socket_path):
        return StateError(
            f"{name} is not running: its service ended before its answer was complete",
            hint=f"see the reason: ovm status {name}",
        )
    return GuestError(
        f"the service of {name} does not answer: {error.message}",
        hint=f"see its log: ovm logs {name} service; or cut the machine's power: ovm stop --force {name}",
    )


def _is_gone(socket_path: Path) -> bool:
    """Whether no process listens at the socket, now or within ``ENDING_S``."""
    deadline = time.monotonic() + ENDING_S
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as looking:
            looking.settimeout(ENDING_S)
            try:
                looking.connect(str(socket_path))
            except (FileNotFoundError, ConnectionRefusedError):
                return True
            except OSError:
                return False
        time.sleep(LOOK_AGAIN_S)
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def decoded(content: bytes | str, kind: type[T], path: str) -> T:
    """Decode the answer of ``path``.

    Raises:
        SkewError: it does not have that shape.
    """
    try:
        return codec.decode(content, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SkewError(
            f"the service's answer to {path} is invalid: {error}", hint="restart the machine with this version of ovm"
        ) from error
