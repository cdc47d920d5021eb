"""QEMU >= 7.2, driven over QMP."""

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
"""The first with ``-netdev stream``, which gvproxy needs."""
QMP_START_S = 30.0
QMP_TIMEOUT_S = 10.0
END_GRACE_S = 5.0
MIGRATE_CANCEL_S = 10.0
MEMORY = "memory"
UNLIMITED_BYTES_PER_S = 2**40
WIRE, PLUG = "wire", "plug"


def escape(value: str | os.PathLike[str]) -> str:
    """``value`` inside one of QEMU's option strings, where a comma is written twice."""
    return os.fspath(value).replace(",", ",,")


def command(spec: VMSpec, emulator: Emulator, accelerator: Accel, *, qmp_fd: int) -> list[str]:
    """QEMU's command line for ``spec``; ``qmp_fd`` is our end's peer of a socket pair."""
    machine = MACHINE[spec.arch]
    shared_memory = []
    if spec.shares:  # virtiofsd maps the guest's memory
        machine += ",memory-backend=memory"
        shared_memory = ["-object", f"memory-backend-memfd,id=memory,size={spec.memory_mib}M,share=on"]
    assert spec.network_socket is not None  # no guest of QEMU's brings its own network
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
        # the hub lets a new wire be plugged in when gvproxy has died
        "-netdev", f"hubport,id={PLUG},hubid=0,netdev={WIRE}", "-netdev", "hubport,id=card,hubid=0",
        "-device", f"virtio-net-pci,netdev=card,mac={spec.mac},romfile=",  # it is not to be booted from
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
    """A QEMU, the accelerator that works with it here, and the virtiofsd that goes with it."""

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
        """The processor of its guests."""
        return self.emulator.arch

    @property
    def accelerator(self) -> str:
        """What runs the guest's instructions."""
        return self.answer.accelerator

    @property
    def accelerator_reason(self) -> str:
        """Why that and nothing else."""
        return self.answer.reason

    def identity(self, spec: VMSpec) -> str:
        """The very QEMU, the host's processor where the guest gets that, and the command line without its paths."""
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
        """The names of the logs a machine with that many shared folders writes."""
        return [self.name, *(f"virtiofsd-{number}" for number in range(shares))]

    @contextlib.asynccontextmanager
    async def start(
        self, group: Group, spec: VMSpec, *, logs: Mapping[str, Path], watcher: Watcher
    ) -> AsyncIterator[QEMU]:
        """QEMU and its virtiofsds; raises as :func:`start` does."""
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
    """A running QEMU; :func:`start` makes one."""

    daemons: tuple[Child, ...] = ()

    def __init__(self, child: Child, qmp: QMPClient, wire: socket.socket, watching: asyncio.Task[None]) -> None:
        self.child = child
        self._qmp = qmp
        self._wire = wire
        self._watching = watching

    async def state(self) -> VMState:
        """What QEMU itself says now."""
        try:
            answer = msgspec.convert(await self._execute("query-status"), Status)
        except msgspec.ValidationError as error:
            raise GuestError(f"QEMU answered query-status with something unexpected: {GuestText.of(error)}") from tamed(
                error
            )
        return STATES.get(answer.status, VMState.ERROR)

    async def pause(self) -> None:
        """Pause the virtual CPUs; fine if they are paused."""
        await self._execute("stop")

    async def resume(self) -> None:
        """Let them run; fine if they do."""
        await self._execute("cont")

    async def request_stop(self) -> bool:
        """Press the ACPI power button; a paused guest would not hear it, so it is resumed first."""
        # past the client: an event loop that is ending has cancelled the client's tasks along with all others
        try:
            for name in ("cont", "system_powerdown"):
                self._wire.send(json.dumps({"execute": name, "id": "button"}).encode())
        except OSError:
            return False
        return True

    async def force_stop(self) -> None:
        """Cut the power; QEMU flushes its images before it goes."""
        self.child.expected = True
        with contextlib.suppress(GuestError):  # the connection may end before the answer
            await self._execute("quit")

    async def replug(self, network_socket: Path) -> None:
        """Lead the guest's network card to the gvproxy that listens there now."""
        for name in (PLUG, WIRE):
            with contextlib.suppress(GuestError):  # an earlier try may have taken it away
                await self._execute("netdev_del", id=name)
        address = {"type": "unix", "path": os.fspath(network_socket)}
        await self._execute("netdev_add", type="stream", id=WIRE, server=False, addr=address)
        await self._execute("netdev_add", type="hubport", id=PLUG, hubid=0, netdev=WIRE)
        if await self.state() is VMState.RUNNING:
            # What the card sent while the hub had no other port waits in its queue, and holds up all that follows: a
            # new port does not flush it (net/hub.c in QEMU), a stop does (net_vm_change_state_handler in net/net.c).
            await asyncio.gather(self._execute("stop"), self._execute("cont"))

    async def save(self, memory: int, *, timeout_s: float) -> None:
        """Stop the guest and write its memory and its devices to the open file ``memory``; its disks are flushed.

        Raises:
            GuestError: it could not be done; the guest does what it did.
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
        """Read memory and devices from the open file ``memory``; the guest is paused.

        Raises:
            GuestError: it could not be done.
            HelperExited: QEMU ended, as it does where it does not like what it reads.
        """
        await self._migrate("migrate-incoming", memory, timeout_s)

    async def _migrate(self, command: str, memory: int, timeout_s: float) -> None:
        """To or from a file, which to QEMU is a migration like any other (QEMU's migration/fd.c takes files, too)."""
        await self._execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self._qmp.send_fd_scm(memory)
        await self._execute("getfd", fdname=MEMORY)
        try:
            await race(self._migrated(command), [self.child], stage=command, timeout_s=timeout_s)
        except NotReadyError:
            raise GuestError(f"QEMU's {command} was not done within {timeout_s:g} s") from None

    async def _migrated(self, command: str) -> None:
        with self._qmp.listener("MIGRATION") as moves:
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
        """End a migration that may be under way; its guest can be resumed then."""
        with self._qmp.listener("MIGRATION") as moves:
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

        if self._watching.done() or self._watching.cancelling():  # and so are the client's own tasks
            raise GuestError(f"QEMU cannot be asked to {name}: the connection to it is over")
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
    """QEMU with its QMP answering; ended on the way out.

    Raises:
        HelperExited: it ended before it answered.
        NotReadyError: it did not answer within QMP_START_S seconds.
    """
    from qemu.qmp import QMPClient, QMPError

    ours, theirs = socket.socketpair()
    qmp = QMPClient("qemu")
    qmp.logger.setLevel(logging.CRITICAL)  # it logs every lost connection as an error; we raise our own
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
            except (QMPError, OSError) as error:  # it hung up: give its death a moment to be noticed
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
        with contextlib.suppress(Exception):  # however the other side went, the connection is over
            await qmp.disconnect()
        ours.close()


def _processor() -> str:
    """The host's processor, as far as a guest could tell it from another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "stepping", "microcode", "flags")))
    return platform.processor()
