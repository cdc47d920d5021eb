"""The boot configuration of an ovm-core guest: one shell command, which its initrd requests on vsock 1025.

The initrd reads it with a single recv() of 2048 bytes into a C string and runs it while the writable root is mounted
at /mnt/overlay (oomol-lab/ovm-core, oomol-lab/vsock-guest-exec). A unit sources /opt/ready.command later, when sshd,
podman.socket and the network are ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from ovm.errors import OptionError
from ovm.guest.bootconfig import BootConfig, fstab_escape

log = logging.getLogger(__name__)

VSOCK_PORT = 1025
COMMAND_MAX_BYTES = 2048
"""Includes the terminating NUL."""
SEND_TIMEOUT_S = 10.0
SENDING_MAX = 16
"""Concurrent connections; one more is closed at once."""

_ROOT = "/mnt/overlay"
_READY = "read -r up _ </proc/uptime\nprintf '%s\\n' {key}\"ready $up\" | socat - VSOCK-CONNECT:2:1026"


def shell_command(config: BootConfig) -> bytes:
    """Build the command, with its NUL.

    Raises:
        OptionError: it is longer than the guest reads, or ``config`` sets something that the guest does not support.
    """
    if config.environment or config.ca_certificates:
        raise OptionError(
            "an ovm-core guest does not support environment and ca_certificates",
            hint='use guest="ovm", or leave them out',
        )
    lines = [
        "umask 077",
        _append(f"{_ROOT}/root/.ssh/authorized_keys", config.authorized_key.strip()),
        _write(f"{_ROOT}/etc/ssh/ssh_host_ed25519_key", config.host_key.strip()),
        _write(f"{_ROOT}/etc/ssh/ssh_host_ed25519_key.pub", config.host_key_public.strip()),
        "umask 022",
        _write(f"{_ROOT}/etc/hostname", config.hostname),
        "umask 077",
        _write(
            f"{_ROOT}/opt/ready.command",
            _READY.format(key=f"'key {config.channel_key}' " if config.channel_key else ""),
        ),
        "umask 022",
    ]
    if config.mounts:
        mounts = (
            f"{tag} {fstab_escape(path)} virtiofs {'ro' if read_only else 'rw'},nofail 0 0"
            for tag, path, read_only in config.mounts
        )
        lines.append(_append(f"{_ROOT}/etc/fstab", "\n".join(mounts)))
    if config.timezone:
        zone = f"/usr/share/zoneinfo/{config.timezone}"
        lines.append(f"ln -sf {shlex.quote(zone)} {_ROOT}/etc/localtime")
        lines.append(_write(f"{_ROOT}/etc/timezone", config.timezone))
    command = "\n".join(lines).encode() + b"\0"
    if len(command) > COMMAND_MAX_BYTES:
        raise OptionError(
            f"an ovm-core guest reads {COMMAND_MAX_BYTES} bytes of configuration, this one has {len(command)}",
            hint="share fewer folders, or folders with shorter paths",
        )
    return command


def _write(path: str, content: str, *, operator: str = ">") -> str:
    directory = path.rpartition("/")[0]
    return f"mkdir -p {directory};printf '%s\\n' {shlex.quote(content)} {operator}{path}"


def _append(path: str, content: str) -> str:
    return _write(path, content, operator=">>")


@contextlib.asynccontextmanager
async def serve(socket_path: Path, command: bytes, on_asked: Callable[[], None]) -> AsyncIterator[None]:
    """Send ``command`` to each connection to ``socket_path``, one per boot; call ``on_asked`` each time."""
    sending: set[asyncio.Task[None]] = set()

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(SEND_TIMEOUT_S):
                writer.write(command)  # one write: the guest reads once
                await writer.drain()
                on_asked()
                await reader.read(1)  # until the guest hangs up: closing first could discard unread data

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(sending) >= SENDING_MAX:
            writer.close()
            return
        task = asyncio.create_task(send(reader, writer))
        sending.add(task)
        task.add_done_callback(sending.discard)

    server = await asyncio.start_unix_server(connected, socket_path, start_serving=False)
    try:
        await server.start_serving()
        await asyncio.to_thread(socket_path.chmod, 0o600)
        yield
    finally:
        server.close()
        for task in tuple(sending):
            task.cancel()
        await asyncio.to_thread(socket_path.unlink, missing_ok=True)
