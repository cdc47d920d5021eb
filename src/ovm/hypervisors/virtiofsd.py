"""virtiofsd: one process for each shared folder, under QEMU.

The Rust version (Debian 13, Fedora) enforces read-only shares since 1.11. The C version (Debian 12's
qemu-system-common) has no such option and requires root: read-only is a mount option in the guest there, which the
guest's root can undo.
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
"""The Rust virtiofsd has version 1.x; the C version has QEMU's version."""
_READ_ONLY_SINCE = (1, 11)


@dataclass(frozen=True, slots=True)
class Virtiofsd:
    """An installed virtiofsd."""

    program: Path
    version: tuple[int, ...]

    @property
    def is_c(self) -> bool:
        """Whether it is the C version from QEMU before 8."""
        return self.version >= _FIRST_C_VERSION

    @property
    def enforces_read_only(self) -> bool:
        """Whether the host enforces read-only shares."""
        return not self.is_c and self.version >= _READ_ONLY_SINCE


def command(daemon: Virtiofsd, share: Share, *, fd: int) -> list[str]:
    """Return virtiofsd's command line; ``fd`` is a socket that listens on ``share.socket``."""
    program, folder = os.fspath(daemon.program), os.fspath(share.host_path)
    if daemon.is_c:
        source = folder.replace("\\", "\\\\").replace(",", "\\,")
        return [program, f"--fd={fd}", "-o", f"source={source}", "-o", "cache=auto"]
    read_only = ["--readonly"] if share.read_only and daemon.enforces_read_only else []
    return [program, f"--fd={fd}", "--shared-dir", folder, "--cache=auto", *read_only]


@contextlib.asynccontextmanager
async def start(group: Group, daemon: Virtiofsd, share: Share, log_path: Path) -> AsyncIterator[Child]:
    """Start a virtiofsd that accepts connections; it ends with its hypervisor, or else on exit.

    Raises:
        FileError: its socket cannot be created.
        HelperError: it cannot be executed.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        # bound here and passed on, so that QEMU can connect before virtiofsd is ready
        try:
            listener.bind(os.fspath(share.socket))
            share.socket.chmod(0o600)
            listener.listen(1)
        except OSError as error:
            raise FileError(f"{share.socket} cannot be created: {error.strerror}") from error
        argv = command(daemon, share, fd=listener.fileno())
        child = await group.spawn(log_path.stem, argv, log_path=log_path, pass_fds=[listener.fileno()])
    async with at_last(partial(child.end, grace_s=END_GRACE_S)):
        yield child
