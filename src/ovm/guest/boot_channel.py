"""Messages of a booting guest, one a line, on a channel where the manager listens.

Every process in the guest, containers included, can connect to a vsock port. So each connection there begins with
``key KEY``, a key of this start that only the guest's root can read. Only root can open a virtio-serial port.

========================== ===================================================================
line                       meaning
========================== ===================================================================
``stage NAME UPTIME``      a boot step is done, UPTIME seconds after the kernel started
``warn TEXT``              a warning for people; the boot continues
``fatal CODE TEXT``        the guest cannot boot and powers off
``ready UPTIME``           sshd and podman's socket listen, the firewall is active
========================== ===================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from ovm.errors import GuestRefused
from ovm.guest.sparing import Sparing
from ovm.text.printable import printable

log = logging.getLogger(__name__)

LAST_WORDS_S = 2.0
"""The connection normally ends with the hypervisor; this limits the wait if it does not."""

FIRST_STAGE = "initrd"
"""First stage of every boot."""

CONNECTIONS_MAX = 16
"""Concurrent connections; one more replaces the oldest without a checked key, or is closed at once."""
LINES_AT_ONCE = 500
"""Lines of one connection before LINE_PAUSE_S delays each further one. A boot sends about twenty."""
LINE_PAUSE_S = 0.02

_LINE_LIMIT_BYTES = 4096
_STAGES_KEPT = 64
_HINTS = {
    "data-damaged": "copy data.img, which was not changed, then extract its files with `btrfs restore`; "
    "or start over with reset_path(data=True)",
    "data-superblock-damaged": "copy data.img, which was not changed, then replace its first superblock by the "
    "second with `btrfs rescue super-recover`, which loses what was synced in the guest's last half minute; "
    "or start over with reset_path(data=True)",
    "data-log-damaged": "copy data.img, which was not changed, then run `btrfs rescue zero-log`, which "
    "loses what was synced in the guest's last half minute; or start over with reset_path(data=True)",
    "data-foreign": "move data.img away: it holds data that ovm did not write, and was not changed",
    "data-unformatted": "restore data.img, which was emptied or replaced, or start over with reset_path(data=True)",
    "rootfs-damaged": "restore the files with reset_path(), and the image with `ovm image verify`",
}


@dataclass(frozen=True, slots=True)
class GuestStage:
    """A completed step of the guest's boot."""

    name: str
    uptime_s: float | None
    """Seconds since the guest's kernel started, if reported."""
    heard_at: float
    """The host's ``time.monotonic()`` on arrival."""


class ReadyChannel:
    """Receives the guest's messages; :func:`listen` creates one."""

    def __init__(self, on_warning: Callable[[str], None], on_reset: Callable[[], None], key: str = "") -> None:
        self.stages: list[GuestStage] = []
        self._key = key
        self._on_warning = Sparing(on_warning, "the guest's warnings")
        self._not_understood = Sparing(log.debug, "unknown lines from the guest")
        self._on_reset = on_reset
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tasks: set[asyncio.Task[None]] = set()
        self._unknown: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one more connection, unless too many are open."""
        if len(self.tasks) >= CONNECTIONS_MAX:
            oldest = next(iter(self._unknown), None)
            if oldest is None:
                writer.close()
                return
            self._unknown.pop(oldest).close()  # its task reads the end of the stream and finishes
        task = asyncio.create_task(self.serve(reader, writer))
        self.tasks.add(task)
        if self._key:
            self._unknown[task] = writer
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._unknown.pop(task, None)

    def expect_boot(self) -> None:
        """Forget the last boot: the guest was reset and will send all messages again."""
        self._drop()
        self.stages = []
        self._ready = asyncio.get_running_loop().create_future()

    def boot_began(self, uptime_s: float | None = None) -> None:
        """Record that a boot begins; if this one already has stages, the guest was reset."""
        if self.stages:
            self._on_reset()
        self._note(FIRST_STAGE, uptime_s)

    async def wait(self) -> None:
        """Wait until the guest reports that it is ready.

        Raises:
            GuestRefused: it reports that it cannot boot.
        """
        await asyncio.shield(self._ready)

    async def last_words(self) -> None:
        """After the hypervisor ended, wait until all messages of the guest are read.

        Raises:
            GuestRefused: the guest reported that it cannot boot.
        """
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=LAST_WORDS_S)
        if self._ready.done():
            self._ready.result()

    def hear(self, line: str) -> None:
        """Process one line. Unknown lines are logged and ignored, because the guest is untrusted."""
        match line.split(" ", 2):
            case ["stage", name, uptime] if (seconds := _seconds(uptime)) is not None:
                if name == FIRST_STAGE:
                    self.boot_began(seconds)
                else:
                    self._note(name, seconds)
            case ["ready", uptime] if (seconds := _seconds(uptime)) is not None:
                self._note("ready", seconds)
                if not self._ready.done():
                    self._ready.set_result(None)
            case ["warn", *rest]:
                self._on_warning(" ".join(rest))
            case ["fatal", code, *rest]:
                if not self._ready.done():
                    self._ready.set_exception(refusal(code, " ".join(rest)))
            case _:
                self._not_understood(f"unknown line from the guest: {line[:200]!r}")

    def _note(self, name: str, uptime_s: float | None) -> None:
        if len(self.stages) < _STAGES_KEPT:
            self.stages.append(GuestStage(name[:40], uptime_s, time.monotonic()))

    def _drop(self) -> None:
        if not self._ready.done():
            self._ready.cancel()
        elif not self._ready.cancelled():
            self._ready.exception()  # retrieved, so that asyncio does not log it as never retrieved

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one connection to its end; a hypervisor may open several, even empty ones."""
        known = not self._key
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            for number in itertools.count():
                if number >= LINES_AT_ONCE:
                    await asyncio.sleep(LINE_PAUSE_S)
                try:
                    line = await reader.readline()
                except ValueError:  # longer than the limit
                    if not known:
                        return
                    continue
                if not line:
                    return
                if not known:
                    known = hmac.compare_digest(line.rstrip(b"\n"), f"key {self._key}".encode())
                    if not known:
                        self._not_understood("rejected a connection without the channel key")
                        return
                    if (task := asyncio.current_task()) is not None:
                        self._unknown.pop(task, None)
                    continue
                self.hear(printable(line.decode(errors="replace").strip()))  # people see it in logs and errors


def refusal(code: str, words: str) -> GuestRefused:
    """Create the error for a ``fatal`` line."""
    return GuestRefused(f"the guest cannot boot: {words or code}", stage=code, hint=_HINTS.get(code, ""))


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


@contextlib.asynccontextmanager
async def listen(
    socket_path: Path, on_warning: Callable[[str], None], on_reset: Callable[[], None], *, key: str = ""
) -> AsyncIterator[ReadyChannel]:
    """Listen on ``socket_path`` for the hypervisor; with a ``key``, connections without it are rejected."""
    channel = ReadyChannel(on_warning, on_reset, key)

    # asyncio yields after it starts to serve: a cancellation inside start_unix_server would leak a serving server
    server = await asyncio.start_unix_server(
        channel.connected, socket_path, limit=_LINE_LIMIT_BYTES, start_serving=False
    )
    try:
        await server.start_serving()
        await asyncio.to_thread(socket_path.chmod, 0o600)
        yield channel
    finally:
        server.close()
        for task in tuple(channel.tasks):
            task.cancel()
        channel._drop()
        await asyncio.to_thread(socket_path.unlink, missing_ok=True)
