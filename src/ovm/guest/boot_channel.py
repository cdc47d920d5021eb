"""What a guest says while it boots, line by line, on a channel the manager listens on.

A vsock port is open to whoever is in the guest, containers too, so there each connection begins with ``key KEY``: one
of this start, which root alone can read in the guest. A virtio-serial port is root's own.

========================== ===================================================================
line                       meaning
========================== ===================================================================
``stage NAME UPTIME``      a step of the boot is done, UPTIME seconds after the kernel started
``warn TEXT``              something to tell people; the boot goes on
``fatal CODE TEXT``        the guest cannot go on and powers off
``ready UPTIME``           sshd and podman's socket listen, the firewall is up
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
"""The connection ends with the hypervisor; this is for one that does not."""

FIRST_STAGE = "initrd"
"""What every boot says first."""

CONNECTIONS_MAX = 16
"""At a time; one more takes the place of the oldest that has not shown the key, or is closed at once."""
LINES_AT_ONCE = 500
"""Of one connection. A boot says some twenty; after so many, LINE_PAUSE_S goes by before the next is read."""
LINE_PAUSE_S = 0.02

_LINE_LIMIT_BYTES = 4096
_STAGES_KEPT = 64
_HINTS = {
    "data-damaged": "the data disk was left as it is: copy data.img away, then take its files out of it with "
    "`btrfs restore`; or start over with reset_path(data=True)",
    "data-superblock-damaged": "the data disk was left as it is: copy data.img away, then have its second superblock "
    "replace the first with `btrfs rescue super-recover`, which costs what was synced in the guest's last half minute; "
    "or start over with reset_path(data=True)",
    "data-log-damaged": "the data disk was left as it is: copy data.img away, then `btrfs rescue zero-log`, which "
    "costs what was synced in the guest's last half minute; or start over with reset_path(data=True)",
    "data-foreign": "data.img carries something that ovm did not put there; move it away, it was left untouched",
    "data-unformatted": "data.img was emptied or replaced; put it back, or start over with reset_path(data=True)",
    "rootfs-damaged": "restore the files with reset_path(), and the image with `ovm image verify`",
}


@dataclass(frozen=True, slots=True)
class GuestStage:
    """A step of the guest's boot."""

    name: str
    uptime_s: float | None
    """Seconds since the guest's kernel started, if it said so."""
    heard_at: float
    """The host's ``time.monotonic()`` when it was heard."""


class ReadyChannel:
    """The guest's words; :func:`listen` makes one."""

    def __init__(self, on_warning: Callable[[str], None], on_reset: Callable[[], None], key: str = "") -> None:
        self.stages: list[GuestStage] = []
        self._key = key
        self._on_warning = Sparing(on_warning, "the guest's warnings")
        self._not_understood = Sparing(log.debug, "lines of the guest that were not understood")
        self._on_reset = on_reset
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tasks: set[asyncio.Task[None]] = set()
        self._unknown: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hear one more connection, if there is room for it."""
        if len(self.tasks) >= CONNECTIONS_MAX:
            oldest = next(iter(self._unknown), None)
            if oldest is None:
                writer.close()
                return
            self._unknown.pop(oldest).close()  # its task reads the end and ends
        task = asyncio.create_task(self.serve(reader, writer))
        self.tasks.add(task)
        if self._key:
            self._unknown[task] = writer
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._unknown.pop(task, None)

    def expect_boot(self) -> None:
        """Forget the last boot: the guest has been reset and will say everything again."""
        self._drop()
        self.stages = []
        self._ready = asyncio.get_running_loop().create_future()

    def boot_began(self, uptime_s: float | None = None) -> None:
        """The guest shows that it is at the beginning of a boot; if it had said anything before, it has been reset."""
        if self.stages:
            self._on_reset()
        self._note(FIRST_STAGE, uptime_s)

    async def wait(self) -> None:
        """Until the guest says that it is ready.

        Raises:
            GuestRefused: it says that it cannot go on.
        """
        await asyncio.shield(self._ready)

    async def last_words(self) -> None:
        """When the hypervisor has ended: until everything the guest wrote has been heard.

        Raises:
            GuestRefused: it had said that it cannot go on.
        """
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=LAST_WORDS_S)
        if self._ready.done():
            self._ready.result()

    def hear(self, line: str) -> None:
        """Take in one line; what makes no sense is logged and passed over, for a guest is not to be trusted."""
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
                self._not_understood(f"not understood from the guest: {line[:200]!r}")

    def _note(self, name: str, uptime_s: float | None) -> None:
        if len(self.stages) < _STAGES_KEPT:
            self.stages.append(GuestStage(name[:40], uptime_s, time.monotonic()))

    def _drop(self) -> None:
        if not self._ready.done():
            self._ready.cancel()
        elif not self._ready.cancelled():
            self._ready.exception()  # so that nobody complains that it was never looked at

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hear one connection to its end; a hypervisor may open several, empty ones too."""
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
                self.hear(printable(line.decode(errors="replace").strip()))  # people will see it


def refusal(code: str, words: str) -> GuestRefused:
    """The error that tells of a ``fatal``."""
    return GuestRefused(f"the guest cannot go on: {words or code}", stage=code, hint=_HINTS.get(code, ""))


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
    """A channel on which the hypervisor can connect to ``socket_path``; with a ``key``, only who has it is heard."""
    channel = ReadyChannel(on_warning, on_reset, key)

    # asyncio pauses behind start_serving: a cancellation there would leave the server to nobody
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
