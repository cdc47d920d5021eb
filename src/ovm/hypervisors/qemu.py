"""QEMU >= 7.2, controlled over QMP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import platform
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ovm.errors import GuestError, NotReadyError, OVMError, StartError
from ovm.hypervisors import Arch, Card, VMSpec, Watcher, virtiofsd
from ovm.hypervisors.accel import CONSOLE, MACHINE, Accel, Answer, Emulator, flags
from ovm.hypervisors.qemu_events import STATES, Status, data, watch
from ovm.model.states import VMState
from ovm.process.child import Child, Group, at_last
from ovm.process.probe import show_version
from ovm.process.supervise import race
from ovm.text.printable import GuestText, tamed

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

log = logging.getLogger(__name__)

OLDEST = (7, 2)
"""First version with ``-netdev stream``, which gvproxy needs."""
QMP_START_S = 30.0
QMP_TIMEOUT_S = 10.0
END_GRACE_S = 5.0
MIGRATE_CANCEL_S = 10.0
MEMORY = "memory"
UNLIMITED_BYTES_PER_S = 2**40
WIRE, PLUG = "wire", "plug"


def escape(value: str | os.PathLike[str]) -> str:
    """Escape ``value`` for QEMU's option strings, where a comma is doubled."""
    return os.fspath(value).replace(",", ",,")


def command(spec: VMSpec, emulator: Emulator, accelerator: Accel, *, qmp_fd: int) -> list[str]:
    """Return QEMU's command line for ``spec``; ``qmp_fd`` is QEMU's end of a socket pair."""
    machine = MACHINE[spec.arch]
    shared_memory = []
    if spec.shares:  # virtiofsd maps the guest's memory
        machine += ",memory-backend=memory"
        shared_memory = ["-object", f"memory-backend-memfd,id=memory,size={spec.memory_mib}M,share=on"]
    assert spec.network_socket is not None  # under QEMU no guest's network runs over a channel
    argv = [
        os.fspath(emulator.program),
        "-nodefaults", "-no-user-config", "-display", "none",
        "-machine", machine, *flags(accelerator, emulator),
        "-smp", str(spec.cpus), "-m", str(spec.memory_mib), *shared_memory,
        "-kernel", os.fspath(spec.kernel), "-initrd", os.fspath(spec.initrd),
        "-append", f"console={CONSOLE[spec.arch]} {spec.cmdline}".strip(),
        "-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control",
        "-chardev", f"file,id=console,path={escape(spec.console_log)},append=on", "-serial", "chardev:console",
        "-device", "virtio-rng-pci",
        "-netdev", f"stream,id={WIRE},server=off,addr.type=unix,addr.path={escape(spec.network_socket)}",
        # the hub allows a new connection after gvproxy has died
        "-netdev", f"hubport,id={PLUG},hubid=0,netdev={WIRE}", "-netdev", "hubport,id=card,hubid=0",
        "-device", f"virtio-net-pci,netdev=card,mac={spec.mac},romfile=",  # no network boot
        "-device", "virtio-serial-pci",
    ]  # fmt: skip
    for number, channel in enumerate(spec.channels):
        argv += ["-chardev", f"socket,id=channel{number},server=off,path={escape(channel.socket)}"]
        argv += ["-device", f"virtserialport,chardev=channel{number},name={channel.name}"]
    for disk in spec.disks:
        block = {
            "driver": "raw",
            "node-name": disk.name,
            "read-only": disk.read_only,
            "discard": "unmap",
            "file": {"driver": "file", "filename": os.fspath(disk.path)},
        }
        argv += ["-blockdev", json.dumps(block), "-device", f"virtio-blk-pci,drive={disk.name},serial={disk.name}"]
    for number, share in enumerate(spec.shares):
        argv += ["-chardev", f"socket,id=share{number},path={escape(share.socket)}"]
        argv += ["-device", f"vhost-user-fs-pci,chardev=share{number},tag={escape(share.tag)}"]
    if spec.waits_for_memory:
        argv += ["-incoming", "defer", "-S"]
    return argv


@dataclass(frozen=True, kw_only=True, slots=True)
class QEMUDriver:
    """A QEMU, its chosen accelerator, and its virtiofsd."""

    emulator: Emulator
    answer: Answer
    virtiofsd: virtiofsd.Virtiofsd | None
    """``None`` if nothing is shared."""

    name: ClassVar[str] = "qemu"
    card: ClassVar[Card] = "qemu"
    tells_resets: ClassVar[bool] = True
    can_replug: ClassVar[bool] = True
    vsock: ClassVar[bool] = False
    reads_initrd_once: ClassVar[bool] = True
    can_suspend: ClassVar[bool] = True

    @property
    def arch(self) -> Arch:
        """Architecture of its guests."""
        return self.emulator.arch

    @property
    def accelerator(self) -> str:
        """Accelerator that runs the guest's instructions."""
        return self.answer.accelerator

    @property
    def accelerator_reason(self) -> str:
        """Why this accelerator was chosen."""
        return self.answer.reason

    def identity(self, spec: VMSpec) -> str:
        """Describe this QEMU, the host's processor if the guest sees it, and the command line without paths."""
        program = self.emulator.program.stat()
        pathless = dataclasses.replace(
            spec,
            kernel=Path("kernel"),
            initrd=Path("initrd"),
            console_log=Path("console"),
            network_socket=Path("net"),
            disks=tuple(dataclasses.replace(disk, path=Path(disk.name)) for disk in spec.disks),
            channels=tuple(dataclasses.replace(channel, socket=Path(channel.name)) for channel in spec.channels),
        )
        facts = [show_version(self.emulator.version), str(program.st_size), str(program.st_mtime_ns)]
        if self.answer.accelerator != "tcg":
            facts.append(_processor())
        return "\n".join(facts + command(pathless, self.emulator, self.answer.accelerator, qmp_fd=0))

    def logs(self, shares: int) -> list[str]:
        """Return the names of the logs of a machine with that many shared folders."""
        return [self.name, *(f"virtiofsd-{number}" for number in range(shares))]

    @contextlib.asynccontextmanager
    async def start(
        self, group: Group, spec: VMSpec, *, logs: Mapping[str, Path], watcher: Watcher
    ) -> AsyncIterator[QEMU]:
        """Run QEMU and its virtiofsds; raises as :func:`start` does."""
        async with AsyncExitStack() as stack:
            daemons = []
            for number, share in enumerate(spec.shares):
                assert self.virtiofsd is not None
                daemon = virtiofsd.start(group, self.virtiofsd, share, logs[f"virtiofsd-{number}"])
                daemons.append(await stack.enter_async_context(daemon))
            running = await stack.enter_async_context(
                start(group, spec, self.emulator, self.answer.accelerator, log_path=logs[self.name], watcher=watcher)
            )
            running.daemons = tuple(daemons)
            yield running


class QEMU:
    """A running QEMU; :func:`start` creates one."""

    daemons: tuple[Child, ...] = ()

    def __init__(self, child: Child, qmp: QMPClient, wire: socket.socket, watching: asyncio.Task[None]) -> None:
        self.child = child
        self._qmp = qmp
        self._wire = wire
        self._watching = watching

    async def state(self) -> VMState:
        """Query the current state from QEMU."""
        try:
            answer = msgspec.convert(await self._execute("query-status"), Status)
        except msgspec.ValidationError as error:
            raise GuestError(f"QEMU returned an invalid answer to query-status: {GuestText.of(error)}") from tamed(
                error
            )
        return STATES.get(answer.status, VMState.ERROR)

    async def pause(self) -> None:
        """Stop the virtual CPUs; no error if they are stopped already."""
        await self._execute("stop")

    async def resume(self) -> None:
        """Resume the virtual CPUs; no error if they run already."""
        await self._execute("cont")

    async def request_stop(self) -> bool:
        """Press the ACPI power button. Resumes first, because a paused guest does not react to it."""
        # not through the client: an event loop that is ending has cancelled the client's tasks with all others
        try:
            for name in ("cont", "system_powerdown"):
                self._wire.send(json.dumps({"execute": name, "id": "button"}).encode())
        except OSError:
            return False
        return True

    async def force_stop(self) -> None:
        """Cut the power; QEMU flushes its images before it exits."""
        self.child.expected = True
        with contextlib.suppress(GuestError):  # the connection may end before the answer
            await self._execute("quit")

    async def replug(self, network_socket: Path) -> None:
        """Connect the guest's network card to the new gvproxy on ``network_socket``."""
        for name in (PLUG, WIRE):
            with contextlib.suppress(GuestError):  # an earlier attempt may have removed it
                await self._execute("netdev_del", id=name)
        address = {"type": "unix", "path": os.fspath(network_socket)}
        await self._execute("netdev_add", type="stream", id=WIRE, server=False, addr=address)
        await self._execute("netdev_add", type="hubport", id=PLUG, hubid=0, netdev=WIRE)
        if await self.state() is VMState.RUNNING:
            # Frames that the card sent while the hub had no other port stay queued and block all later ones. A new
            # port does not flush the queue (net/hub.c in QEMU), a stop does (net_vm_change_state_handler in net/net.c).
            # Both commands are sent at once, so a cancellation in between cannot leave the guest stopped.
            await asyncio.gather(self._execute("stop"), self._execute("cont"))

    async def save(self, memory: int, *, timeout_s: float) -> None:
        """Pause the guest, flush its disks and write its saved state to the open file ``memory``.

        Raises:
            GuestError: it failed; the guest is in its previous state again.
            HelperExited: QEMU ended.
        """
        ran = await self.state() is VMState.RUNNING
        try:
            await self.pause()
            await self._execute("migrate-set-parameters", **{"max-bandwidth": UNLIMITED_BYTES_PER_S})
            await self._migrate("migrate", memory, timeout_s)
        except (GuestError, asyncio.CancelledError):
            with contextlib.suppress(OVMError):
                await self._take_back()
                if ran:
                    await self.resume()
            raise

    async def load(self, memory: int, *, timeout_s: float) -> None:
        """Load a saved state from the open file ``memory``; the guest stays paused.

        Raises:
            GuestError: it failed.
            HelperExited: QEMU ended, as it does when it rejects the saved state.
        """
        await self._migrate("migrate-incoming", memory, timeout_s)

    async def _migrate(self, command: str, memory: int, timeout_s: float) -> None:
        """Migrate to or from a file. QEMU treats it like any other migration (its migration/fd.c accepts files)."""
        await self._execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self._qmp.send_fd_scm(memory)
        await self._execute("getfd", fdname=MEMORY)
        try:
            await race(self._migrated(command), [self.child], stage=command, timeout_s=timeout_s)
        except NotReadyError:
            raise GuestError(f"QEMU did not finish {command} within {timeout_s:g} s") from None

    async def _migrated(self, command: str) -> None:
        with self._qmp.listener("MIGRATION") as moves:  # before the command, or its last event could be missed
            await self._execute(command, uri=f"fd:{MEMORY}")
            async for move in moves:
                match data(move).get("status"):
                    case "completed":
                        return
                    case "failed" | "cancelled" as ended:
                        told = await self._execute("query-migrate")
                        why = told.get("error-desc") if isinstance(told, dict) else None
                        raise GuestError(f"QEMU's {command} {ended}" + (f": {GuestText(str(why))}" if why else ""))

    async def _take_back(self) -> None:
        """Cancel a running migration, so that the guest can be resumed."""
        with self._qmp.listener("MIGRATION") as moves:  # before the query, or the end right after it could be missed
            told = await self._execute("query-migrate")
            if not isinstance(told, dict) or told.get("status") not in {"setup", "active", "device", "cancelling"}:
                return
            await self._execute("migrate_cancel")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MIGRATE_CANCEL_S):
                    async for move in moves:
                        if data(move).get("status") in {"cancelled", "completed", "failed"}:
                            return

    async def _execute(self, name: str, **arguments: Any) -> Any:
        from qemu.qmp import ExecuteError, QMPError

        if self._watching.done() or self._watching.cancelling():  # and the client's own tasks are, too
            raise GuestError(f"QEMU cannot run {name}: its control connection is closed")
        try:
            async with asyncio.timeout(QMP_TIMEOUT_S):
                return await self._qmp.execute(name, arguments or None)
        except ExecuteError as error:
            raise GuestError(f"QEMU refused {name}: {GuestText.of(error)}") from tamed(error)
        except (QMPError, asyncio.IncompleteReadError, OSError) as error:
            raise GuestError(f"QEMU did not answer {name}: {GuestText.of(error)}") from tamed(error)
        except TimeoutError as error:
            raise GuestError(f"QEMU did not answer {name} within {QMP_TIMEOUT_S:g} s") from error


@contextlib.asynccontextmanager
async def start(
    group: Group,
    spec: VMSpec,
    emulator: Emulator,
    accelerator: Accel,
    *,
    log_path: Path,
    watcher: Watcher,
) -> AsyncIterator[QEMU]:
    """Start QEMU and wait until QMP answers; end QEMU on exit.

    Raises:
        HelperExited: it ended before it answered.
        NotReadyError: it did not answer within QMP_START_S seconds.
    """
    from qemu.qmp import QMPClient, QMPError

    ours, theirs = socket.socketpair()
    qmp = QMPClient("qemu")
    qmp.logger.setLevel(logging.CRITICAL)  # it logs every lost connection as an error; ovm raises its own
    try:
        with theirs:
            argv = command(spec, emulator, accelerator, qmp_fd=theirs.fileno())
            child = await group.spawn("qemu", argv, log_path=log_path, pass_fds=[theirs.fileno()])
    except BaseException:
        ours.close()
        raise
    watching: asyncio.Task[None] | None = None
    try:
        async with at_last(partial(child.end, grace_s=END_GRACE_S)):
            try:
                await race(qmp.connect(ours), [child], stage="hypervisor", timeout_s=QMP_START_S, evidence=log_path)
            except (QMPError, OSError) as error:  # it closed the connection: wait until its exit is noticed
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_GRACE_S):
                        await child.wait()
                if not child.running:
                    raise await child.exited("hypervisor") from error
                words = GuestText.of(error)
                raise StartError(f"QEMU's control socket failed: {words}", stage="hypervisor") from tamed(error)
            watching = asyncio.create_task(watch(qmp, watcher), name="qmp events")
            yield QEMU(child, qmp, ours, watching)
    finally:
        if watching is not None:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        with contextlib.suppress(Exception):  # however QEMU ended, the connection is closed
            await qmp.disconnect()
        ours.close()


def _processor() -> str:
    """Describe the host's processor, as far as a guest can tell it apart from another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "stepping", "microcode", "flags")))
    return platform.processor()
