"""Starts a service that outlives whoever starts it, and follows it until the machine is ready."""

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
"""How long a stop, a suspend or a reset by somebody else is waited for."""
READY_TIMEOUT_S = 1800.0
"""A whole start: its copies of the image, and a guest that boots under emulation, twice if its kernel fails."""
LOOK_AGAIN_S = 0.02
ASK_AGAIN_S = 0.2
LISTEN_TIMEOUT_S = 60.0
"""A Python that has to be read from a cold disk on a busy machine is slow."""


_COMING = frozenset({VMState.STARTING, VMState.RESTORING})
_GOING = frozenset({VMState.STOPPING, VMState.STOPPED, VMState.SAVING})
"""A machine in a reset is in one of these, too, and comes up again."""


class _Report(msgspec.Struct):
    """What a service tells once it listens, or cannot."""

    error: dict[str, object] | None = None


def launch(machine: Machine) -> Service:
    """Start the service of ``machine``; returns as soon as it listens, while the machine is being started.

    Raises:
        InUseError: there is one already.
        StartError: it did not come up.
        UnsupportedError: this is a frozen app, which has no Python to run it with.
    """
    if guard.frozen_app():
        raise UnsupportedError(
            "a frozen app cannot start a machine's service", hint="hold the machine in the app: ovm.create_ovm()"
        )
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as told:  # noqa: PTH123 - a descriptor
        try:
            argv = [sys.executable, "-P", "-m", "ovm.service", machine.name, str(writing)]
            started = subprocess.run(
                argv,
                env={"LOGNAME": f"user-{os.getuid()}"}
                | os.environ,  # asyncssh requires a name, also of a user without one
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
            hint=f"its whole log is {log}",
        ) from error
    if report.error is not None:
        raise from_dict(report.error)
    return Service(machine.name, machine.service_socket)


def listening(machine: Machine, *, timeout_s: float = LISTEN_TIMEOUT_S) -> Service:
    """The service that holds ``machine``, once it answers: one that has just begun does not yet.

    Raises:
        StateError: no service holds it, or that has just ended.
        GuestError: the service does not answer.
        SkewError: it is of another version, or not the service.
    """
    service, deadline = Service(machine.name, machine.service_socket), time.monotonic() + timeout_s
    while True:
        try:
            service.status()
        except StateError:
            if machines.at_rest(machine).held_by != "service" or time.monotonic() > deadline:
                raise
            service = Service(machine.name, machine.service_socket)  # its record may have come to say where that is
        else:
            return service
        time.sleep(LOOK_AGAIN_S)


def wait_until_gone(machine: Machine, *, timeout_s: float = GONE_TIMEOUT_S) -> None:
    """Until the service has let go of the machine, and it can be started again.

    Raises:
        StopError: it has not within ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while machines.at_rest(machine).held_by == "service":
        if time.monotonic() > deadline:
            raise StopError(f"the service of {machine.name} does not end", hint=f"see: ovm logs {machine.name} service")
        time.sleep(LOOK_AGAIN_S)


@contextlib.contextmanager
def following(service: Service, progress: Callable[[str], object]) -> Iterator[None]:
    """While inside, ``progress`` is called with each step the service tells of, from another thread."""
    after = max((told.id for told in service.events(follow=False)), default=0)

    def follow() -> None:
        with contextlib.suppress(OVMError):  # whoever is inside learns of it, too
            for told in service.events(after=after):
                if told.name == "step":
                    progress(told.step)

    threading.Thread(target=follow, daemon=True).start()
    yield


def up(
    machine: Machine, progress: Callable[[str], object], *, launched: Callable[[Service], object] = lambda _: None
) -> tuple[Service, list[OVMError]]:
    """Have the machine run: start it, or wait for the start that goes on; one that is being stopped is started after.

    Args:
        machine: The machine.
        progress: Called with each step.
        launched: Called with the service as soon as it listens, if this call has started it.

    Returns:
        Its service, and what went wrong beside the start: a port that could not be opened, for one.

    Raises:
        OVMError: whatever the start failed of.
        StartError: the machine was stopped before it was ready, or its service was killed.
        InUseError: another command keeps it from starting.
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
    """The service that holds it, once its machine runs; ``None`` if that has stopped, and can be started."""
    waits = False
    while time.monotonic() < deadline:
        try:
            service = listening(machine)
            after = max((told.id for told in service.events(follow=False)), default=0)
            status = service.status()  # only now: a ready that comes later than this has a later number
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
    """Until the machine is ready; returns what went wrong beside that, and raises as :func:`up` does.

    ``after`` is the number of an event of before this start: an earlier ``ready`` does not count.
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
            hint=f"see why: ovm status {machine.name}",
        ) from error
    with contextlib.suppress(StopError):  # whoever learns of the failure finds a machine that can be started again
        wait_until_gone(machine)
    raise failed[-1] if failed else StartError(f"{machine.name} was stopped before it was ready", stage="service")
