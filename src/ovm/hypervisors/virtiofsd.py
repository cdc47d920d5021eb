"""virtiofsd: one process for each shared folder, under QEMU.

The Rust one (Debian 13, Fedora) enforces read-only from 1.11 on. The C one (in Debian 12's qemu-system-common) has
no such option and wants root: there, read-only is a mount option in the guest, which the guest's root could undo.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ovm.errors import FileError
from ovm.hypervisors import Share
from ovm.process.child import Child, Group, at_last

END_GRACE_S = 2.0

_FIRST_C_VERSION = (2,)
"""The Rust virtiofsd is at 1.x, the C one carried QEMU's version."""
_READ_ONLY_SINCE = (1, 11)


@dataclass(frozen=True, slots=True)
class Virtiofsd:
    """An installed virtiofsd."""

    program: Path
    version: tuple[int, ...]

    @property
    def is_c(self) -> bool:
        """Whether it is the C one that came with QEMU before 8."""
        return self.version >= _FIRST_C_VERSION

    @property
    def enforces_read_only(self) -> bool:
        """Whether a read-only share is read-only whatever the guest does."""
        return not self.is_c and self.version >= _READ_ONLY_SINCE


def command(daemon: Virtiofsd, share: Share, *, fd: int) -> list[str]:
    """Virtiofsd's command line; ``fd`` is a socket that listens on ``share.socket``."""
    program, folder = os.fspath(daemon.program), os.fspath(share.host_path)
    if daemon.is_c:
        source = folder.replace("\\", "\\\\").replace(",", "\\,")
        return [program, f"--fd={fd}", "-o", f"source={source}", "-o", "cache=auto"]
    read_only = ["--readonly"] if share.read_only and daemon.enforces_read_only else []
    return [program, f"--fd={fd}", "--shared-dir", folder, "--cache=auto", *read_only]


@contextlib.asynccontextmanager
async def start(group: Group, daemon: Virtiofsd, share: Share, log_path: Path) -> AsyncIterator[Child]:
    """A virtiofsd that can be connected to; it ends with its hypervisor, or else on the way out.

    Raises:
        FileError: its socket cannot be made.
        HelperError: it cannot be executed.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        # bound here and handed over, so that nobody has to wait for the socket to appear
        try:
            listener.bind(os.fspath(share.socket))
            share.socket.chmod(0o600)
            listener.listen(1)
        except OSError as error:
            raise FileError(f"{share.socket} cannot be made: {error.strerror}") from error
        argv = command(daemon, share, fd=listener.fileno())
        child = await group.spawn(log_path.stem, argv, log_path=log_path, pass_fds=[listener.fileno()])
    async with at_last(partial(child.end, grace_s=END_GRACE_S)):
        yield child
