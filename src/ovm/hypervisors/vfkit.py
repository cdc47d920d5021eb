"""vfkit >= 0.6.2 (Apple's Virtualization framework), controlled over its REST socket.

From the source of vfkit 0.6.4: a comma ends an option of ``--device`` and cannot be escaped; some socket paths are
parsed as URLs, others are literal; a stop is the power button and fails while the machine is paused; the answer to a
hard stop is often lost, because the process ends with the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import msgspec

from ovm.errors import FileError, GuestError, SocketPathError, UnsupportedError
from ovm.hypervisors import Arch, Card, Happening, VMSpec, Watcher
from ovm.model.states import VMState
from ovm.process import logs as log_files
from ovm.process.child import Child, Group, at_last
from ovm.process.supervise import race
from ovm.text.printable import GuestText
from ovm.wire import http
from ovm.wire.error import WireError

log = logging.getLogger(__name__)

CONSOLE = "hvc0"
ROSETTA_TAG = "rosetta"

REST_START_S = 30.0
"""Long, because a first start waits for Gatekeeper."""
CONNECT_RETRY_S = 0.005
ANSWER_TIMEOUT_S = 5.0
"""Timeout of queries, and of requests that vfkit answers on receipt."""
PAUSE_TIMEOUT_S = 30.0
"""Timeout of pause and resume, which vfkit answers when they are done."""
SETTLE_RETRY_S = 0.1
END_GRACE_S = 2.0
"""Short: on SIGTERM vfkit presses the power button and waits 5 s, but the guest already had its time to stop."""

LOCAL_SOCKET_LONGEST = "vfkit-ffffffff-ffff.sock"
"""Longest name that vfkit creates for its end of the network, in the same directory."""
_SOCKET_PATH_ALPHABET = re.compile(r"[A-Za-z0-9._/-]+")

_ENDED_LINES = 100
_GUEST_WENT = "VM is stopped"
_WAS_TOLD_TO_GO = "captured "


class _State(msgspec.Struct, rename="camel"):
    """The answer to GET /vm/state; before 0.5.0 without the ``can…`` fields."""

    state: str
    can_pause: bool = True
    can_resume: bool = True
    can_stop: bool = True
    can_hard_stop: bool = True


def check_paths(device_paths: Iterable[Path], socket_dir: Path) -> None:
    """Reject paths that vfkit's command line cannot express.

    Raises:
        FileError: a path has a comma.
        SocketPathError: ``socket_dir`` has characters with a meaning in URLs.
    """
    for path in device_paths:
        if "," in os.fspath(path):
            raise FileError(f"{path}: vfkit does not support paths with a comma", hint="rename it, or choose another")
    if not _SOCKET_PATH_ALPHABET.fullmatch(os.fspath(socket_dir)):
        raise SocketPathError(
            f"socket_dir {socket_dir}: vfkit parses some characters of a socket's path as a URL",
            hint="choose a path of only letters, digits and . _ / -",
        )


def command(spec: VMSpec, program: Path) -> list[str]:
    """Return vfkit's command line for ``spec``."""
    devices = [f"virtio-blk,path={disk.path}" + (",readonly" if disk.read_only else "") for disk in spec.disks]
    if spec.network_socket is not None:
        # not type=unixgram,path=…, which older versions do not support
        devices.append(f"virtio-net,unixSocketPath={spec.network_socket},mac={spec.mac}")
    devices += [f"virtio-vsock,port={c.vsock_port},socketURL={c.socket},listen" for c in spec.channels]
    devices += [f"virtio-fs,sharedDir={share.host_path},mountTag={share.tag}" for share in spec.shares]
    devices += ["virtio-rng", f"virtio-serial,logFilePath={spec.console_log}"]
    if spec.rosetta:
        devices.append(f"rosetta,mountTag={ROSETTA_TAG}")
    return [
        os.fspath(program),
        "--cpus", str(spec.cpus), "--memory", str(spec.memory_mib),
        "--kernel", os.fspath(spec.kernel), "--initrd", os.fspath(spec.initrd),
        "--kernel-cmdline", f"console={CONSOLE} {spec.cmdline}".strip(),
        "--restful-uri", f"unix://{spec.control_socket}",
        *(word for device in devices for word in ("--device", device)),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class VfkitDriver:
    """A vfkit and the Mac it runs on."""

    program: Path
    version: str
    arch: Arch

    name: ClassVar[str] = "vfkit"
    card: ClassVar[Card] = "vfkit"
    tells_resets: ClassVar[bool] = False
    can_replug: ClassVar[bool] = False  # vfkit connects to gvproxy only once
    vsock: ClassVar[bool] = True
    reads_initrd_once: ClassVar[bool] = False  # not documented for Apple's framework
    can_suspend: ClassVar[bool] = False  # crc-org/vfkit#449
    accelerator: ClassVar[str] = "hvf"

    @property
    def accelerator_reason(self) -> str:
        """Why this accelerator was chosen."""
        return f"Apple's Virtualization framework, by vfkit {self.version}"

    def identity(self, spec: VMSpec) -> str:
        """Return a text that is never compared, because vfkit cannot suspend."""
        return f"vfkit {self.version} {spec.arch}"

    def logs(self, shares: int) -> list[str]:
        """Return the name of its only log: it shares folders itself."""
        del shares
        return [self.name]

    @contextlib.asynccontextmanager
    async def start(
        self, group: Group, spec: VMSpec, *, logs: Mapping[str, Path], watcher: Watcher
    ) -> AsyncIterator[Vfkit]:
        """Start vfkit and wait until REST answers; end vfkit on exit.

        Raises:
            HelperExited: it ended before it answered.
            NotReadyError: it did not answer within REST_START_S seconds.
        """
        log_path = logs[self.name]
        child = await group.spawn(self.name, command(spec, self.program), log_path=log_path, cwd=log_path.parent)
        watching = asyncio.create_task(_watch(child, log_path, watcher), name="vfkit's end")
        try:
            async with at_last(partial(child.end, grace_s=END_GRACE_S)), http.connect(spec.control_socket) as rest:
                vfkit = Vfkit(child, rest)
                try:
                    await race(
                        vfkit.answers(spec.control_socket),
                        [child],
                        stage="hypervisor",
                        timeout_s=REST_START_S,
                        evidence=log_path,
                        hint="check whether macOS asks for permission to run vfkit",
                    )
                    yield vfkit
                finally:
                    if child.running:
                        await vfkit.force_stop()
        finally:
            watching.cancel()
            await asyncio.wait({watching})


class Vfkit:
    """A running vfkit; :meth:`VfkitDriver.start` creates one."""

    daemons: tuple[Child, ...] = ()

    def __init__(self, child: Child, rest: http.UnixHTTP) -> None:
        self.child = child
        self._rest = rest

    async def answers(self, socket_path: Path) -> None:
        """Wait until REST answers; the guest itself reports when it boots."""
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(socket_path)
                writer.close()
                await self._ask()
            except (OSError, GuestError):  # if vfkit is about to end, its exit explains more
                await asyncio.sleep(CONNECT_RETRY_S)
            else:
                return

    async def state(self) -> VMState:
        """Query the current state from vfkit."""
        return _known((await self._ask()).state)

    async def pause(self) -> None:
        """Stop the virtual CPUs; no error if they are stopped already."""
        now = await self._settled()
        await self._become(VMState.PAUSED, "Pause", now, possible=now.can_pause)

    async def resume(self) -> None:
        """Resume the virtual CPUs; no error if they run already."""
        now = await self._settled()
        await self._become(VMState.RUNNING, "Resume", now, possible=now.can_resume)

    async def request_stop(self) -> bool:
        """Press the power button. Resumes first, because vfkit cannot press it while the guest is paused."""
        try:
            await self.resume()
            if (await self._ask()).can_stop:
                await self._order("Stop", timeout_s=ANSWER_TIMEOUT_S)
        except GuestError as error:
            log.info("cannot press the power button: %s", error.message)
            return False
        return True

    async def force_stop(self) -> None:
        """Cut the power. A lost answer is normal, because the process ends with the machine."""
        self.child.expected = True
        try:
            if (await self._ask()).can_hard_stop:
                await self._order("HardStop", timeout_s=ANSWER_TIMEOUT_S)
        except GuestError as error:
            log.debug("vfkit did not confirm the hard stop: %s", error.message)

    async def replug(self, network_socket: Path) -> None:
        """Raise UnsupportedError."""
        raise UnsupportedError(f"vfkit cannot reconnect its network card to {network_socket}")

    async def save(self, memory: int, *, timeout_s: float) -> None:
        """Raise UnsupportedError."""
        del memory, timeout_s
        raise UnsupportedError("vfkit cannot save a guest's memory")

    async def load(self, memory: int, *, timeout_s: float) -> None:
        """Raise UnsupportedError."""
        del memory, timeout_s
        raise UnsupportedError("vfkit cannot load a guest's memory")

    async def _ask(self) -> _State:
        try:
            return await self._rest.get("/vm/state", _State, timeout_s=ANSWER_TIMEOUT_S)
        except WireError as error:
            raise GuestError(f"vfkit did not report its state: {error.message}") from error

    async def _settled(self) -> _State:
        """Return the state once an abandoned pause or resume has finished, or after PAUSE_TIMEOUT_S."""
        deadline = time.monotonic() + PAUSE_TIMEOUT_S
        while True:
            now = await self._ask()
            if _known(now.state) not in {VMState.PAUSING, VMState.RESUMING} or time.monotonic() > deadline:
                return now
            await asyncio.sleep(SETTLE_RETRY_S)

    async def _become(self, wanted: VMState, verb: str, now: _State, *, possible: bool) -> None:
        if _known(now.state) is wanted:
            return
        if not possible:
            raise GuestError(f"vfkit cannot {verb.lower()} the machine while it is {_spoken(now.state)}")
        try:
            await self._order(verb, timeout_s=PAUSE_TIMEOUT_S)
        except GuestError:
            with contextlib.suppress(GuestError):
                if await self.state() is wanted:  # only the answer was lost
                    return
            raise

    async def _order(self, verb: str, *, timeout_s: float) -> None:
        try:
            await self._rest.post("/vm/state", {"state": verb}, timeout_s=timeout_s)
        except WireError as error:
            raise GuestError(f"vfkit did not {verb.lower()} the machine: {_words(error)}") from error


def _spoken(state: str) -> str:
    return state.removeprefix("VirtualMachineState").lower()


def _known(state: str) -> VMState:
    try:
        return VMState(state)
    except ValueError:
        return VMState.ERROR


def _words(error: WireError) -> str:
    """Return vfkit's own error text, from ``{"error": …}``."""
    try:
        return str(GuestText(msgspec.json.decode(error.content, type=dict[str, str])["error"]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        return error.message


async def _watch(child: Child, log_path: Path, watcher: Watcher) -> None:
    """Report when the guest powered itself off. Reads the log, because vfkit's exit status is 0 after SIGTERM, too."""
    await child.wait()
    if child.process.returncode == 0:
        tail = await asyncio.to_thread(log_files.tail, log_path, _ENDED_LINES)
        if any(_GUEST_WENT in line for line in tail) and not any(_WAS_TOLD_TO_GO in line for line in tail):
            watcher(Happening.POWERED_OFF, "")
