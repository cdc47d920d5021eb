"""The process that holds a machine's service lock, and how it is ended without its socket.

Its record says who it is, the kernel says who holds the lock. Only a process that both name is sent a signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ovm.errors import StopError
from ovm.model.defaults import STOP_TIMEOUT_S
from ovm.process import identity, lock
from ovm.process.identity import Identity
from ovm.registry import machines, records
from ovm.registry.machines import Machine
from ovm.registry.records import ServiceRecord

SAME_SIGNAL_S = 1.0
"""Wrappers pass on a signal that the terminal has sent already; what follows so soon is no second wish to a service."""
SECOND_SIGNAL_S = 1.5 * SAME_SIGNAL_S
OBEYS_S = 10.0
"""After two signals a service that can still do anything has cut the power, and ended."""
SHUT_DOWN_S = STOP_TIMEOUT_S + 60.0
GONE_S = 30.0
"""After its kill: the guard ends what it has left."""
ASK_TIMEOUT_S = 10.0
LOOK_AGAIN_S = 0.02

Send = Callable[[signal.Signals], None]


def end(machine: Machine, *, force: bool = True) -> None:
    """End the machine's service by signals; fine if there is none. Returns when its helpers are gone, too.

    The first SIGTERM shuts the guest down. With ``force`` a second one cuts its power, and SIGKILL follows.

    Raises:
        StopError: nobody knows for certain which process the service is, or it does not end.
    """
    if machines.at_rest(machine).held_by != "service":
        return
    with _certain(machine) as send:
        send(signal.SIGTERM)
        if not force:
            if not _is_let_go(machine, SHUT_DOWN_S):
                raise StopError(
                    f"the service of {machine.name} does not end",
                    hint=f"cut the machine's power: ovm stop --force {machine.name}",
                )
        elif not _is_let_go(machine, SECOND_SIGNAL_S):
            send(signal.SIGTERM)
            if not _is_let_go(machine, OBEYS_S):
                send(signal.SIGKILL)
    if not _is_let_go(machine, GONE_S):
        raise StopError(
            f"processes of {machine.name} do not end, {GONE_S:g} s after their service was killed",
            hint=f"see: ovm logs {machine.name} service",
        )


def _is_let_go(machine: Machine, timeout_s: float) -> bool:
    """Whether nobody holds it within that time: neither its service, nor what a killed one has left."""
    deadline = time.monotonic() + timeout_s
    while machines.at_rest(machine).held_by != "nobody":
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True


@contextmanager
def _certain(machine: Machine) -> Iterator[Send]:
    """Sends signals to the service of ``machine``, and to no other process even if that gets its pid."""
    record = records.read(machine.service_record, ServiceRecord)
    try:
        fd = os.pidfd_open(record.pid) if record is not None and hasattr(os, "pidfd_open") else None
    except OSError:  # it has ended, it is no pid, or the kernel is one before 5.3
        fd = None
    try:
        # looked at behind the pidfd: what has this identity now is what the pidfd refers to
        if record is None or not _is_it(machine, record):
            raise StopError(
                f"nobody can tell which process holds {machine.service_lock}: {machine.service_record} does not say",
                hint=f"end the process that has that file open, which `fuser {machine.service_lock}` shows",
            )
        pid, who = record.pid, identity.of(record.pid)

        def send(number: signal.Signals) -> None:
            if fd is not None and hasattr(signal, "pidfd_send_signal"):
                try:
                    signal.pidfd_send_signal(fd, number)
                except ProcessLookupError:
                    return
            elif who is not None and identity.is_there(who):
                os.kill(pid, number)

        yield send
    finally:
        if fd is not None:
            os.close(fd)


def _is_it(machine: Machine, record: ServiceRecord) -> bool:
    """Whether the process that the record names is there, is ours, and holds the lock."""
    try:
        named = Identity(pid=record.pid, started=record.started, program=record.program)
    except ValueError:
        return False
    return (
        bool(record.boot_id)
        and record.boot_id == identity.boot()
        and identity.of(named.pid) == named
        and identity.owner(named.pid) == os.geteuid()
        and named.pid != os.getpid()
        and _has_lock(machine, named)
    )


def _has_lock(machine: Machine, process: Identity) -> bool:
    if sys.platform == "linux":
        return process in lock.holders(machine.service_lock)
    argv = ["/usr/sbin/lsof", "-t", "-a", "-p", str(process.pid), "--", os.fspath(machine.service_lock)]
    try:
        found = subprocess.run(argv, capture_output=True, check=False, timeout=ASK_TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.split() == [str(process.pid).encode()]
