"""Gvproxy, the process that is the guest's network: its command line, its directory, its begin and its end.

Facts from gvproxy 0.8.9, run: its exit status is 0 for runtime errors too, so "it ended" is the failure; a
forwarded port accepts connections before there is a guest, so accepting is no sign of readiness; attached to
QEMU it leaves on SIGTERM only after QEMU has gone, so the machine ends first.
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
"""What the guest calls the host's loopback."""
GUEST_MAC = "5a:94:ef:e4:0c:ee"
"""gvproxy's static lease for GUEST_ADDRESS."""
MTU = 1500

API_START_S = 30.0
"""A first start on macOS waits for Gatekeeper."""
CONNECT_RETRY_S = 0.005
_UNIX_SOCKETS = Path("/proc/net/unix")
"""Its columns: number, references, protocol, flags (00010000: listens), type (0001: stream, 0002: datagram), ..."""
END_GRACE_S = 2.0

Wire = Literal["qemu", "vfkit", "channel"]
"""How the guest's frames arrive: QEMU's stream, vfkit's datagrams, or from the guest itself, over a channel."""


def argv(program: Path, sockets: SocketPaths, wire: Wire) -> list[str]:
    """Gvproxy's command line. ``-ssh-port -1``: sshd is exposed by us, so that a taken port is only picked again."""
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
    """Gvproxy's process: at most one at a time, each in place of the last one."""

    def __init__(self, spawn: Callable[[], Awaitable[Child]], sockets: SocketPaths, log_path: Path) -> None:
        self._spawn = spawn
        self._sockets = sockets
        self._log_path = log_path
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        """The last process that was started."""
        assert self._child is not None
        return self._child

    async def begin(self) -> None:
        """Start gvproxy; returns when its API answers and the hypervisor can connect. :func:`lay_out` comes first.

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
            hint="on macOS, Gatekeeper may be asking whether gvproxy may run",
        )

    async def end(self) -> None:
        """End gvproxy; fine if it has ended, or was never started."""
        if self._child is not None:
            await self._child.end(grace_s=END_GRACE_S)


def lay_out(sockets: SocketPaths) -> None:
    """Make gvproxy's directory, without a socket in it, and the links that lead to its sockets.

    Raises:
        FileError: it cannot be made, or holds more than sockets.
    """
    if sockets.gvproxy.is_symlink():
        raise FileError(f"{sockets.gvproxy} is a link", hint="remove it")
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
    """Leave a link that is right as it is: somebody may be about to connect."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


async def _is_up(sockets: SocketPaths) -> None:
    """Until both sockets can be connected to; gvproxy does not report when, so they are tried again and again."""
    await _answers(sockets.network_api)
    card = sockets.made_by_gvproxy(sockets.network_card)
    while True:  # gvproxy makes it after the API's, so a hypervisor that starts at once may come too early
        if await asyncio.to_thread(_is_open, card):
            return
        await asyncio.sleep(CONNECT_RETRY_S)


def _is_open(path: Path) -> bool:
    """Whether the socket at ``path`` is bound and, unless it is for datagrams, listens.

    Linux's table of sockets is read, because gvproxy takes the first connection for the hypervisor's. macOS has no such
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
    """Until something listens on ``path``."""
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.sleep(CONNECT_RETRY_S)
        else:
            writer.close()
            return
