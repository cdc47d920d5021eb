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

from ovm import machines
from ovm.errors import OVMError, StartError, StopError, UnsupportedError, from_dict
from ovm.machines import Machine
from ovm.process import guard, logs
from ovm.service.client import Service

GONE_TIMEOUT_S = 60.0
LOOK_AGAIN_S = 0.02
LISTEN_TIMEOUT_S = 60.0
"""A Python that has to be read from a cold disk on a busy machine is slow."""


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


def follow_start(service: Service, progress: Callable[[str], object]) -> list[OVMError]:
    """Until the machine is ready; returns what went wrong beside that: a port that could not be opened, for one.

    Raises:
        OVMError: whatever it failed of.
        StartError: it was stopped meanwhile.
    """
    failed: list[OVMError] = []
    for told in service.events():
        if told.name == "step":
            progress(told.step)
        elif told.error is not None:
            failed.append(from_dict(told.error))
        elif told.name == "ready":
            return failed
        elif told.name == "close":
            break
    raise failed[-1] if failed else StartError(f"{service.name} was stopped before it was ready")
