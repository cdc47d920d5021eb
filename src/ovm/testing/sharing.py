"""One machine for several test runs: the first starts it, the last stops it, even if others die meanwhile.

Each test run holds a shared kernel lock on a file of the machine, so the last one can lock it exclusively. The file
names the start of the machine by tests; a machine that a user has started is not stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ovm import sync
from ovm.errors import InUseError, OVMError, StateError
from ovm.model.states import VMState
from ovm.registry import machines
from ovm.service import client, launch
from ovm.testing import LOCK
from ovm.trust import directories
from ovm.trust.locks import lock_within, open_lock, try_lock, unlock

if TYPE_CHECKING:
    from ovm.registry.machines import Machine
    from ovm.service.protocol import Status

log = logging.getLogger(__name__)

STOP_WAIT_S = client.STOP_MARGIN_S + 100.0
"""How long to wait for another test run that is stopping the machine."""
START_WAIT_S = client.START_TIMEOUT_S
AGAIN_S = 0.1
MARK_MAX_BYTES = 200


@contextlib.contextmanager
def sharing(name: str, *, template: str, keep: bool, stop: bool) -> Iterator[sync.RemoteOVM]:
    """Keep the machine ``name`` running while inside.

    Args:
        name: Name of the machine.
        template: Machine whose settings are copied before the start, if it is another one.
        keep: Leave the machine running at the end of this and other test runs.
        stop: Stop it on exit, unless it is in use or was not started by tests.

    Raises:
        OVMError: it cannot be started.
    """
    machine = machines.of(name)
    try:
        with _lock(machine) as fd:
            _take(fd, machine)
            try:
                _running(machine, fd, template)
                if keep:
                    os.ftruncate(fd, 0)
                with sync.connect(name) as connected:
                    yield connected
            finally:
                unlock(fd)  # closing is not enough: a forked process may have the same lock
    finally:
        if stop:
            stop_if_unused(machine)


def stop_unused(name: str) -> None:
    """Stop the machine ``name`` and those of its workers, if tests started them and no test run uses them."""
    for other in machines.names():
        if other == name or re.fullmatch(rf"{re.escape(name)}-gw\d+", other):
            try:
                stop_if_unused(machines.of(other))
            except OVMError as error:
                log.warning("%s keeps running: %s", other, error)


def stop_if_unused(machine: Machine) -> None:
    """Stop the machine if tests started it and no test run uses it."""
    with _lock(machine) as fd:
        if not try_lock(fd):
            return
        if not (mark := os.pread(fd, MARK_MAX_BYTES, 0)):
            return
        service = client.Service(machine.name, machine.service_socket)
        try:
            if _mark(service.status()) == mark:
                service.stop()
                launch.wait_until_gone(machine)
        except StateError:
            log.debug("%s is not running any more", machine.name)
        os.ftruncate(fd, 0)


def _running(machine: Machine, fd: int, template: str) -> None:
    """Start the machine unless it runs; raises the error of the start."""
    deadline = time.monotonic() + START_WAIT_S
    if template != machine.name and machines.at_rest(machine).held_by == "nobody":
        machine.write_settings(machines.of(template).settings_text())
    ours: list[client.Service] = []

    def launched(service: client.Service) -> None:
        ours.append(service)
        _write(fd, _mark(service.status()))  # before it is ready, in case we die meanwhile

    while True:
        try:
            service, problems = launch.up(machine, lambda _step: None, launched=launched)
            for problem in problems:
                log.warning("%s", problem)
            if service.status().state is VMState.PAUSED:
                service.resume()
        except OVMError:
            if ours or time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_S)
        else:
            return


def _mark(status: Status) -> bytes:
    return f"{status.pid} {status.started_at!r}\n".encode()


def _write(fd: int, mark: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, mark, 0)


@contextlib.contextmanager
def _lock(machine: Machine) -> Iterator[int]:
    directories.make(machine.directory)
    fd = open_lock(machine.directory / LOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def _take(fd: int, machine: Machine) -> None:
    if not lock_within(fd, STOP_WAIT_S, shared=True):
        raise InUseError(
            f"another test run has been stopping {machine.name} for {STOP_WAIT_S:g} s",
            hint=f"see its status: ovm status {machine.name}",
        )
