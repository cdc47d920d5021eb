"""gvproxy, the guest's network: its command line, its directory, its start and its end.

Observed with gvproxy 0.8.9: it exits with status 0 after runtime errors, too, so every unexpected exit is a failure; a
forwarded port accepts connections before the guest exists, so a connection does not prove readiness; with QEMU attached
it ends on SIGTERM only after QEMU has ended, so the machine ends first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from ovm.errors import FileError
from ovm.paths import SocketPaths
from ovm.process.child import Child
from ovm.process.supervise import race
from ovm.trust import directories

GUEST_ADDRESS = "192.168.127.2"
GATEWAY_ADDRESS = "192.168.127.1"
HOST_ALIAS = "192.168.127.254"
"""The guest's address of the host's loopback."""
GUEST_MAC = "5a:94:ef:e4:0c:ee"
"""gvproxy's static lease for GUEST_ADDRESS."""
MTU = 1500

API_START_S = 30.0
"""Long, because a first start on macOS waits for Gatekeeper."""
CONNECT_RETRY_S = 0.005
_UNIX_SOCKETS = Path("/proc/net/unix")
"""Columns: number, references, protocol, flags (00010000: listens), type (0001: stream, 0002: datagram), ..."""
END_GRACE_S = 2.0

Wire = Literal["qemu", "vfkit", "channel"]
"""Transport of the guest's frames: QEMU's stream, vfkit's datagrams, or a channel of the guest."""


def argv(program: Path, sockets: SocketPaths, wire: Wire) -> list[str]:
    """Return gvproxy's command line. ``-ssh-port -1``: ovm exposes sshd itself, and retries if the port is taken."""
    api, card = (sockets.made_by_gvproxy(link) for link in (sockets.network_api, sockets.network_card))
    listen_to_card = {
        "qemu": ("-listen-qemu", f"unix://{card}"),
        "vfkit": ("-listen-vfkit", f"unixgram://{card}"),
        "channel": ("-listen", f"unix://{card}"),
    }
    return [
        str(program),
        "-mtu", str(MTU),
        "-ssh-port", "-1",
        "-listen", f"unix://{api}",
        *listen_to_card[wire],
    ]  # fmt: skip


class Gvproxy:
    """gvproxy's process: at most one at a time; a new one replaces the last."""

    def __init__(self, spawn: Callable[[], Awaitable[Child]], sockets: SocketPaths, log_path: Path) -> None:
        self._spawn = spawn
        self._sockets = sockets
        self._log_path = log_path
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        """The last started process."""
        assert self._child is not None
        return self._child

    async def begin(self) -> None:
        """Start gvproxy, and return when its API answers and the hypervisor can connect. Call :func:`lay_out` first.

        Raises:
            HelperExited: it ended before it answered.
            NotReadyError: it was not ready within API_START_S seconds.
        """
        self._child = await self._spawn()
        await race(
            _is_up(self._sockets),
            [self._child],
            stage="network",
            timeout_s=API_START_S,
            evidence=self._log_path,
            hint="check on macOS whether Gatekeeper asks for permission to run gvproxy",
        )

    async def end(self) -> None:
        """End gvproxy; no error if it has ended or was never started."""
        if self._child is not None:
            await self._child.end(grace_s=END_GRACE_S)


def lay_out(sockets: SocketPaths) -> None:
    """Create gvproxy's directory, delete old sockets in it, and create the links to its sockets.

    Raises:
        FileError: it cannot be created, or holds other files than sockets.
    """
    if sockets.gvproxy.is_symlink():
        raise FileError(f"{sockets.gvproxy} is a symbolic link", hint="remove it")
    try:
        with contextlib.suppress(FileExistsError):
            sockets.gvproxy.mkdir(mode=0o700)
        directories.make(sockets.gvproxy, private=True)
        for path in sockets.left_by_gvproxy():
            path.unlink()
        for link in (sockets.network_api, sockets.network_card, sockets.podman):
            _link(link, sockets.made_by_gvproxy(link).relative_to(sockets.directory))
        others = [path.name for path in sockets.gvproxy.iterdir()]
    except OSError as error:
        raise FileError(f"{sockets.gvproxy} cannot be prepared: {error.strerror}") from error
    if others:
        raise FileError(
            f"{sockets.gvproxy} holds {others[0]}, which root in the guest could remove",
            hint="move it elsewhere, or choose another socket_dir",
        )


def _link(link: Path, target: Path) -> None:
    """Create or fix a link. A correct one is not replaced, because a client may be connecting through it."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


async def _is_up(sockets: SocketPaths) -> None:
    """Wait until both sockets accept connections. gvproxy does not report that, so they are polled."""
    await _answers(sockets.network_api)
    card = sockets.made_by_gvproxy(sockets.network_card)
    while True:  # gvproxy creates it after the API's, so a hypervisor could otherwise connect too early
        if await asyncio.to_thread(_is_open, card):
            return
        await asyncio.sleep(CONNECT_RETRY_S)


def _is_open(path: Path) -> bool:
    """Return whether the socket at ``path`` is bound and, unless it is for datagrams, listens.

    Reads Linux's table of sockets, because gvproxy would treat a test connection as the hypervisor. macOS has no such
    table; its hypervisor sends datagrams.
    """
    if not path.is_socket():
        return False
    try:
        table = _UNIX_SOCKETS.read_bytes()
    except OSError:
        return True
    line = rb"^\S+ \S+ \S+ (?:00010000 0001|\S+ 0002) \S+ +\d+ %b$" % re.escape(os.fsencode(path))
    return re.search(line, table, re.MULTILINE) is not None


async def _answers(path: Path) -> None:
    """Wait until a connection to ``path`` succeeds."""
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.sleep(CONNECT_RETRY_S)
        else:
            writer.close()
            return
