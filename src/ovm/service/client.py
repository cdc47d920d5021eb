"""A service's socket from the outside, for those who wait: no event loop, quick to import."""

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
"""For what is answered at once."""
CHANGE_TIMEOUT_S = 120.0
"""For what waits for the hypervisor or the guest."""
STOP_MARGIN_S = 60.0
"""What a stop may take beyond what the guest is given."""
START_TIMEOUT_S = 600.0
"""For what starts the machine again."""
ENDING_S = 2.0
"""A service that hung up is gone by then, or it goes on."""
LOOK_AGAIN_S = 0.05


class Service:
    """The service of the machine ``name``; each call is a connection of its own.

    Calls raise :class:`ovm.StateError` if there is no service, :class:`ovm.SkewError` if it is not understood, and
    whatever it was that the service could not do.
    """

    def __init__(self, name: str, socket_path: Path) -> None:
        self.name = name
        self._socket_path = socket_path

    def status(self) -> p.Status:
        """What the machine and the service are about; ask this first, for it tells the service's version too.

        Raises:
            StateError: there is no service.
            SkewError: it is of a version of ovm that is not understood.
        """
        with self._asked("GET", "/v1/status", None, ANSWER_TIMEOUT_S) as answer:
            return checked_status(self.name, answer.read())

    def info(self) -> Info:
        """Where the machine is reached."""
        return self._get("/v1/info", Info)

    def state(self) -> StateInfo:
        """Its state, as the hypervisor tells it now."""
        return self._get("/v1/state", StateInfo)

    def pause(self) -> StateInfo:
        """Pause its virtual CPUs."""
        return self._post("/v1/pause", None, StateInfo)

    def resume(self) -> StateInfo:
        """Let them run again."""
        return self._post("/v1/resume", None, StateInfo)

    def stop(self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut it down; the service ends then."""
        wanted = p.Stop(force=force, timeout_s=timeout_s)
        self._post("/v1/stop", wanted, p.Stopped, timeout_s=timeout_s + STOP_MARGIN_S)

    def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Keep its memory on disk; the service ends then."""
        wanted = p.Suspend(timeout_s=timeout_s)
        self._post("/v1/suspend", wanted, p.Stopped, timeout_s=timeout_s + STOP_MARGIN_S)

    def reset(self, *, data: bool = False) -> StateInfo:
        """Stop it, restore its files, start it again."""
        return self._post("/v1/reset", p.Reset(data=data), StateInfo, timeout_s=START_TIMEOUT_S)

    def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's."""
        return self._post("/v1/clocksync", None, ClockSync)

    def ports(self) -> list[Forward]:
        """Which ports of the host lead to the guest."""
        return self._get("/v1/ports", list[Forward])

    def add_port(self, wanted: p.PortWanted) -> Forward:
        """Lead a port of the host to the guest."""
        return self._post("/v1/ports/add", wanted, Forward)

    def remove_port(self, unwanted: p.PortUnwanted) -> None:
        """Close one."""
        self._post("/v1/ports/remove", unwanted, type(None))

    def prune(self, wanted: p.Prune) -> Pruned:
        """Have podman remove what nothing uses."""
        return self._post("/v1/prune", wanted, Pruned, timeout_s=START_TIMEOUT_S)

    def events(self, *, after: int = 0, follow: bool = True, timeout_s: float | None = None) -> Iterator[Event]:
        """What has happened behind the event number ``after``, and with ``follow`` what happens, until it is over.

        ``timeout_s`` seconds are for all of them; with ``None`` those that are followed may take for ever.

        Raises:
            StateError: the service ended without a proper end of the events: it was killed.
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
    """What the status of every version of ovm has told and will tell."""

    version: str
    api: int
    pid: int


def checked_status(name: str, content: bytes) -> p.Status:
    """The status, from a service that speaks as we do.

    Raises:
        SkewError: it does not.
    """
    hint = f"stop it, then start it again: ovm stop {name}; ovm start {name}"
    try:
        service = decoded(content, _Version, "/v1/status")
    except SkewError as error:
        raise SkewError(error.message, hint=hint) from error
    if service.api != p.API:
        raise SkewError(
            f"the service of {name} is of ovm {service.version}, which ovm {__version__} does not understand",
            hint=hint,
        )
    return decoded(content, p.Status, "/v1/status")


def failure(content: bytes, path: str) -> OVMError:
    """What the service says went wrong."""
    return from_dict(decoded(content, p.Problem, path).error)


def lost(name: str, socket_path: Path, error: WireError) -> OVMError:
    """What it means that there was no answer; a service that hung up is given the time to be gone."""
    if any(isinstance(cause, (FileNotFoundError, ConnectionRefusedError)) for cause in _causes(error)):
        return StateError(f"{name} is not running", hint=f"start it: ovm start {name}")
    if not isinstance(error.__cause__, TimeoutError) and _is_gone(socket_path):
        return StateError(
            f"{name} is not running: its service ended before its answer was complete",
            hint=f"see why: ovm status {name}",
        )
    return GuestError(
        f"the service of {name} does not answer: {error.message}",
        hint=f"see: ovm logs {name} service; to cut the power without its answer: ovm stop --force {name}",
    )


def _is_gone(socket_path: Path) -> bool:
    """Whether nobody listens there any more, or soon."""
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
    """What ``path`` has answered.

    Raises:
        SkewError: it is not of that shape.
    """
    try:
        return codec.decode(content, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SkewError(
            f"{path} was answered with something unexpected: {error}", hint="restart the machine with this ovm"
        ) from error
