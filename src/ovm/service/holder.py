"""End the process that holds a machine's service lock, without its socket.

The service record names a process, and the kernel names the lock's holder. A signal is sent only if both agree.
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
"""A wrapper may forward a signal that the terminal has already sent, so a service ignores a second one this soon."""
SECOND_SIGNAL_S = 1.5 * SAME_SIGNAL_S
OBEYS_S = 10.0
"""Time for a service to cut the power and end after two signals; then it hangs."""
SHUT_DOWN_S = STOP_TIMEOUT_S + 60.0
GONE_S = 30.0
"""Time after SIGKILL for the guard to end the remaining helpers."""
ASK_TIMEOUT_S = 10.0
LOOK_AGAIN_S = 0.02

Send = Callable[[signal.Signals], None]


def end(machine: Machine, *, force: bool = True) -> None:
    """End the machine's service by signals, if there is one. Returns when its helpers have ended, too.

    The first SIGTERM shuts the guest down. With ``force`` a second one cuts its power, and SIGKILL follows.

    Raises:
        StopError: the service's process cannot be identified for certain, or does not end.
    """
    if machines.at_rest(machine).held_by != "service":
        return
    with _certain(machine) as send:
        send(signal.SIGTERM)
        if not force:
            if not _is_let_go(machine, SHUT_DOWN_S):
                raise StopError(
                    f"the service of {machine.name} does not end within {SHUT_DOWN_S:g} s",
                    hint=f"cut the machine's power: ovm stop --force {machine.name}",
                )
        elif not _is_let_go(machine, SECOND_SIGNAL_S):
            send(signal.SIGTERM)
            if not _is_let_go(machine, OBEYS_S):
                send(signal.SIGKILL)
    if not _is_let_go(machine, GONE_S):
        raise StopError(
            f"processes of {machine.name} have not ended within {GONE_S:g} s after their service",
            hint=f"see the log: ovm logs {machine.name} service",
        )


def _is_let_go(machine: Machine, timeout_s: float) -> bool:
    """Whether the machine is released within that time, by its service and by helpers that a killed one left."""
    deadline = time.monotonic() + timeout_s
    while machines.at_rest(machine).held_by != "nobody":
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True


@contextmanager
def _certain(machine: Machine) -> Iterator[Send]:
    """Yield a function that signals the service of ``machine``, and no other process even if it gets the same pid."""
    record = records.read(machine.service_record, ServiceRecord)
    try:
        fd = os.pidfd_open(record.pid) if record is not None and hasattr(os, "pidfd_open") else None
    except OSError:  # it has ended, it is no pid, or the kernel is older than 5.3
        fd = None
    try:
        # after opening the pidfd: a process with this identity now is the one that the pidfd refers to
        if record is None or not _is_it(machine, record):
            raise StopError(
                f"cannot tell which process holds {machine.service_lock}: {machine.service_record} does not name it",
                hint=f"end the process that `fuser {machine.service_lock}` shows",
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
    """Whether the process that the record names exists, is another process of this user, and holds the lock."""
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
