"""Start a service that outlives the process that starts it, and follow it until the machine is ready."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from ovm.errors import InUseError, OVMError, StartError, StateError, StopError, UnsupportedError, from_dict
from ovm.model.states import VMState
from ovm.process import guard, logs
from ovm.registry import machines
from ovm.registry.machines import Machine
from ovm.service.client import Service

GONE_TIMEOUT_S = 60.0
CHANGED_TIMEOUT_S = 600.0
"""How long to wait for another command's stop, suspend or reset."""
READY_TIMEOUT_S = 1800.0
"""Limit of a whole start: copying the image, and booting under emulation, twice if the kernel crashes."""
LOOK_AGAIN_S = 0.02
ASK_AGAIN_S = 0.2
LISTEN_TIMEOUT_S = 60.0
"""Long, because Python starts slowly from a cold disk on a busy machine."""


_COMING = frozenset({VMState.STARTING, VMState.RESTORING})
_GOING = frozenset({VMState.STOPPING, VMState.STOPPED, VMState.SAVING})
"""Includes the states of a machine in a reset, which starts again."""


class _Report(msgspec.Struct):
    """A service's report that it listens, or why it cannot."""

    error: dict[str, object] | None = None


def launch(machine: Machine) -> Service:
    """Start the service of ``machine``; returns as soon as it listens, before the machine is ready.

    Raises:
        InUseError: a service runs already.
        StartError: the service did not start.
        UnsupportedError: this is a frozen app, which has no Python to run the service.
    """
    if guard.frozen_app():
        raise UnsupportedError(
            "a frozen app cannot start a machine's service", hint="run the machine in the app: ovm.create_ovm()"
        )
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as told:  # noqa: PTH123 - a descriptor
        try:
            argv = [sys.executable, "-P", "-m", "ovm.service", machine.name, str(writing)]
            started = subprocess.run(
                argv,
                env={"LOGNAME": f"user-{os.getuid()}"}
                | os.environ,  # asyncssh requires a user name, and some users have none
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[writing],
                check=False,
                timeout=LISTEN_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StartError(f"the service of {machine.name} cannot be started: {error}", stage="service") from error
        finally:
            os.close(writing)
        if started.returncode != 0:
            raise StartError(
                f"the service of {machine.name} could not be started",
                stage="service",
                log_tail=tuple(started.stderr.decode(errors="replace").splitlines()[-logs.TAIL_LINES :]),
            )
        ready, _, _ = select.select([told], [], [], LISTEN_TIMEOUT_S)
        content = told.read() if ready else b""
    try:
        report = msgspec.json.decode(content, type=_Report)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log = logs.log_path(machine.log_dir, "service")
        raise StartError(
            f"the service of {machine.name} {'ended before it listened' if ready else 'does not listen'}",
            stage="service",
            log_tail=logs.tail(log),
            hint=f"read the whole log: {log}",
        ) from error
    if report.error is not None:
        raise from_dict(report.error)
    return Service(machine.name, machine.service_socket)


def listening(machine: Machine, *, timeout_s: float = LISTEN_TIMEOUT_S) -> Service:
    """Return the service that holds ``machine``. Waits for one that has just started to answer.

    Raises:
        StateError: no service holds the machine, or it has just ended.
        GuestError: the service does not answer.
        SkewError: the answer is not from a compatible service.
    """
    service, deadline = Service(machine.name, machine.service_socket), time.monotonic() + timeout_s
    while True:
        try:
            service.status()
        except StateError:
            if machines.at_rest(machine).held_by != "service" or time.monotonic() > deadline:
                raise
            service = Service(machine.name, machine.service_socket)  # the record may name another socket now
        else:
            return service
        time.sleep(LOOK_AGAIN_S)


def wait_until_gone(machine: Machine, *, timeout_s: float = GONE_TIMEOUT_S) -> None:
    """Wait until the service has released the machine, which can then be started again.

    Raises:
        StopError: the service still holds it after ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while machines.at_rest(machine).held_by == "service":
        if time.monotonic() > deadline:
            raise StopError(
                f"the service of {machine.name} does not end within {timeout_s:g} s",
                hint=f"see its log: ovm logs {machine.name} service",
            )
        time.sleep(LOOK_AGAIN_S)


@contextlib.contextmanager
def following(service: Service, progress: Callable[[str], object]) -> Iterator[None]:
    """Call ``progress`` from another thread with each step that the service reports while inside."""
    after = max((told.id for told in service.events(follow=False)), default=0)

    def follow() -> None:
        with contextlib.suppress(OVMError):  # the caller's own request fails, too
            for told in service.events(after=after):
                if told.name == "step":
                    progress(told.step)

    threading.Thread(target=follow, daemon=True).start()
    yield


def up(
    machine: Machine, progress: Callable[[str], object], *, launched: Callable[[Service], object] = lambda _: None
) -> tuple[Service, list[OVMError]]:
    """Start the machine, or wait for a start in progress. Waits for a stop in progress first.

    Args:
        machine: Machine to start.
        progress: Called with each step.
        launched: Called with the service as soon as it listens, if this call started it.

    Returns:
        The service, and the errors that did not fail the start, such as a port that could not be forwarded.

    Raises:
        OVMError: the start failed.
        StartError: the machine was stopped before it was ready, or its service was killed.
        InUseError: another command still holds the machine.
    """
    deadline = time.monotonic() + CHANGED_TIMEOUT_S
    while True:
        try:
            service = launch(machine)
        except InUseError:
            if (joined := _join(machine, progress, deadline)) is not None:
                return joined
            if time.monotonic() > deadline:
                raise
        else:
            launched(service)
            return service, _follow_start(machine, service, progress, after=0)


def _join(
    machine: Machine, progress: Callable[[str], object], deadline: float
) -> tuple[Service, list[OVMError]] | None:
    """Return the running service once its machine runs; ``None`` if it has stopped and can be started."""
    waits = False
    while time.monotonic() < deadline:
        try:
            service = listening(machine)
            after = max((told.id for told in service.events(follow=False)), default=0)
            # after the events: a ready that comes after this status has a number above `after`
            status = service.status()
        except StateError:
            if machines.at_rest(machine).held_by != "service":
                return None
            raise
        if status.state not in _GOING:
            if status.state in _COMING or status.step:
                return service, _follow_start(machine, service, progress, after=after)
            return service, []
        if not waits:
            progress(f"waiting until another command has stopped {machine.name}")
            waits = True
        time.sleep(ASK_AGAIN_S)
    return None


def _follow_start(
    machine: Machine, service: Service, progress: Callable[[str], object], *, after: int
) -> list[OVMError]:
    """Wait until the machine is ready; returns the errors that did not fail the start; raises as :func:`up` does.

    ``after`` is the number of an event before this start, so that an earlier ``ready`` is ignored.
    """
    failed: list[OVMError] = []
    try:
        for told in service.events(after=after, timeout_s=READY_TIMEOUT_S):
            if told.name == "step":
                progress(told.step)
            elif told.error is not None:
                failed.append(told.error)
            elif told.name == "ready":
                return failed
            elif told.name == "close":
                break
    except StateError as error:
        raise StartError(
            f"the service of {machine.name} ended before the machine was ready",
            stage="service",
            log_tail=logs.tail(logs.log_path(machine.log_dir, "service")),
            hint=f"see the reason: ovm status {machine.name}",
        ) from error
    with contextlib.suppress(StopError):  # so that the caller can start it again at once
        wait_until_gone(machine)
    raise failed[-1] if failed else StartError(f"{machine.name} was stopped before it was ready", stage="service")
