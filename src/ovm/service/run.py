"""The service's process: runs one machine, serves requests on a socket, and ends when the machine is down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from ovm import paths
from ovm.errors import FileError, InUseError, OVMError
from ovm.integrations import add as register_with_others
from ovm.integrations import ssh_config
from ovm.process import logs
from ovm.process.logcap import kept_small
from ovm.registry import machines, records
from ovm.registry.machines import Machine
from ovm.registry.records import Ended, ServiceRecord
from ovm.service import journal, preload
from ovm.service.app import app
from ovm.service.connection import Connection
from ovm.service.holder import SAME_SIGNAL_S
from ovm.service.host import Host
from ovm.service.openapi import document
from ovm.trust import directories
from ovm.trust.atomic import disk_errors
from ovm.trust.locks import lock_within, open_lock

if TYPE_CHECKING:
    from ovm.machine.vm import OVM
    from ovm.model.info import Info
    from ovm.service.host import Step

log = logging.getLogger(__name__)

FAREWELL_S = 5
"""Time for the last answers and events to reach their clients."""

TAKE_S = 0.2
"""Time to take the lock, because a process that checks whether it is held takes it for a moment, too."""


async def serve(machine: Machine, *, listening: Callable[[Host], object]) -> Host:
    """Start the machine and run it until it is down; returns the host, which knows how it ended.

    SIGTERM and SIGINT shut the guest down; a second signal cuts its power. ``listening`` is called as soon as the
    socket exists, before the machine is created.

    Raises:
        InUseError: another service holds the machine.
        FileError: a directory of the machine cannot be used.
    """
    host = _host(machine)
    with _owned(machine):
        try:
            await _hold(machine, host, listening)
        except OVMError as error:  # before the machine was created
            await asyncio.to_thread(_record_end, machine, Ended.failed(error))
            raise
    return host


def _host(machine: Machine) -> Host:
    started = machine.settings()
    return Host(
        machine.name,
        lambda tell: _make(machine, tell),
        settle=lambda made: _settle(machine, made),
        restart_needed=lambda: machines.restart_needed(machine, started),
    )


async def _hold(machine: Machine, host: Host, listening: Callable[[Host], object]) -> None:
    sockets = paths.SocketPaths(paths.default_socket_dir(machine.name))
    with _listening(sockets.service) as listener:
        await asyncio.to_thread(records.save, machine.service_record, ServiceRecord.ours(sockets.directory))
        _follow_signals(host)
        async with kept_small([logs.log_path(machine.log_dir, "service")]), _answering(host, listener):
            listening(host)
            await host.run()
            # while the socket still answers: a client that it refuses later reads this record
            await asyncio.to_thread(_record_end, machine, _ended(host))


def _record_end(machine: Machine, ended: Ended) -> None:
    """Record how the machine ended. If that fails, leave a damaged record, neither an old one nor signs of a crash."""
    try:
        records.save(machine.ended_record, ended)
        machine.service_record.unlink(missing_ok=True)
    except (OSError, OVMError) as error:
        log.error("cannot record how %s ended (%s): %s", machine.name, ended.reason, error)  # noqa: TRY400 - no bug
        with contextlib.suppress(OSError):  # a rename works on a full disk
            machine.service_record.replace(machine.ended_record)
        with contextlib.suppress(OSError):
            machine.service_record.unlink(missing_ok=True)


def _ended(host: Host) -> Ended:
    if host.died_of is not None:
        return Ended.failed(host.died_of)
    if host.stop_wanted:
        return Ended(at=time.time(), reason="stopped")
    return Ended(at=time.time(), reason="suspended" if host.suspend_wanted else "powered-off")


async def _make(machine: Machine, tell: Step) -> OVM:
    from ovm.registry.create import create_from_settings

    tell("preparing")
    return await create_from_settings(machine)


async def _settle(machine: Machine, made: OVM) -> Sequence[OVMError]:
    """Forward the ports in the settings and register the machine with ssh, docker and podman; returns the errors."""
    settings = await asyncio.to_thread(machine.settings)
    failed: list[OVMError] = []
    for port in settings.ports:
        try:
            await made.export_port(port.host_port, port.guest_port, protocol=port.protocol, address=port.address)
        except OVMError as error:
            failed.append(error)
    failed += await asyncio.to_thread(_tell_others, machine, made.info, register=settings.register)
    await asyncio.to_thread(preload.everything)
    return failed


def _tell_others(machine: Machine, info: Info, *, register: bool) -> list[OVMError]:
    failed: list[OVMError] = []
    try:
        ssh_config.write(machine.name, port=info.ssh_port)
    except OVMError as error:
        failed.append(error)
    if register:
        failed += register_with_others(machine.name, info.podman_socket).problems
    return failed


@contextlib.contextmanager
def _owned(machine: Machine) -> Iterator[None]:
    """Hold the lock of the machine's service. No child inherits it, so it is released when this process ends."""
    fd = open_lock(machine.service_lock)
    try:
        _take(fd, machine)
        yield
    finally:
        os.close(fd)


def _take(fd: int, machine: Machine) -> None:
    if not lock_within(fd, TAKE_S):
        raise InUseError(f"{machine.name} has a service already", hint=f"see its status: ovm status {machine.name}")


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """Listen at ``path``, with access for this user alone; the socket is deleted on exit."""
    try:
        directories.make(path.parent, private=True)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)  # set the mode at the creation: a later chmod would leave a gap
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        raise FileError(f"cannot create the socket {path}: {error.strerror or error}") from error
    try:
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """Waits for an event to end, where uvicorn's own server polls ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.over = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to ``_follow_signals``."""
        yield

    async def main_loop(self) -> None:
        """Wait until the machine is down."""
        await self.over.wait()


@contextlib.asynccontextmanager
async def _answering(host: Host, listener: socket.socket) -> AsyncIterator[None]:
    config = uvicorn.Config(
        app(host, document),
        loop="none",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=FAREWELL_S,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.over.set()
        await serving


def _follow_signals(host: Host) -> None:
    loop = asyncio.get_running_loop()
    stopping: set[asyncio.Task[None]] = set()
    first_at = 0.0

    def stop(number: signal.Signals) -> None:
        nonlocal first_at
        if not stopping:
            first_at = time.monotonic()
            host.stop_signal = number
        elif time.monotonic() - first_at < SAME_SIGNAL_S:
            return
        stopping.add(asyncio.create_task(_stop(host, force=bool(stopping))))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal that started it may be closed


async def _stop(host: Host, *, force: bool) -> None:
    try:
        await host.stop(force=force)
    except OVMError as error:
        log.warning("%s", error)


def main(arguments: Sequence[str]) -> int:
    """``NAME [FD]``: run the service of the machine NAME; with FD detach, and report there once how the start went."""
    name, *rest = arguments
    report = open(int(rest[0]), "wb") if rest else None  # noqa: PTH123, SIM115 - a descriptor, open until the report
    if report is not None:
        os.set_inheritable(report.fileno(), False)
    journal.begin()

    def tell(error: OVMError | None = None) -> None:
        if report is not None and not report.closed:
            with contextlib.suppress(OSError), report:
                report.write(json.dumps({"error": error.as_dict() if error else None}).encode())

    try:
        machine = machines.find(name)
        if report is not None:
            _detach(machine)
        failed = asyncio.run(serve(machine, listening=lambda _: tell())).died_of
    except OVMError as error:
        tell(error)
        failed = error
    except Exception:  # logged here, because the interpreter would print the message unfiltered
        log.exception("the service failed")
        return 1
    if failed is not None:
        log.error("%s", failed)
    return 0 if failed is None else 1


def _detach(machine: Machine) -> None:
    """Continue as a child without terminal and parent, whose output goes to the service's log."""
    if os.fork():
        os._exit(0)
    os.setsid()
    directories.make(machine.log_dir)
    with disk_errors(f"the log of {machine.name}'s service cannot be written"):
        with logs.rotate(machine.log_dir, "service").open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    os.chdir("/")
