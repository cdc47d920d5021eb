"""A guest's sshd, run in the test's own process; what it answers is the test's choice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

import asyncssh
import pytest

from ovm.guest.ssh import SSH, make_keys
from ovm.paths import KeyPaths, public


class Sshd(asyncssh.SSHServer):
    """A guest's sshd, run here: its commands are this host's, by way of sh."""

    def __init__(self, keys: KeyPaths) -> None:
        self.keys = keys
        self.port = 0
        self.connections: list[asyncssh.SSHServerConnection] = []
        self.commands: list[str] = []
        self.serve = run_command
        self.may_listen = True

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self.connections.append(conn)

    def server_requested(self, listen_host: str, listen_port: int) -> bool:
        return self.may_listen and listen_host == "127.0.0.1"

    def unix_server_requested(self, listen_path: str) -> bool:
        return self.may_listen

    async def handle(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        self.commands.append(process.command or "")
        with contextlib.suppress(asyncssh.Error, OSError):
            await self.serve(process)

    def client(self, keys: KeyPaths | None = None) -> SSH:
        return SSH(self.port, keys or self.keys)


async def run_command(process: asyncssh.SSHServerProcess[bytes]) -> None:
    child = await asyncio.create_subprocess_exec(
        "sh", "-c", process.command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
    )

    def kill(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if child.returncode is None:
                os.killpg(child.pid, number)

    async def read_input() -> None:
        while True:
            try:
                while chunk := await process.stdin.read(65536):
                    child.stdin.write(chunk)
                    await child.stdin.drain()
                break
            except asyncssh.SignalReceived as received:
                kill(getattr(signal, f"SIG{received.signal}"))
            except OSError:
                break
        child.stdin.close()

    async def copy(source: asyncio.StreamReader, target: asyncssh.SSHWriter[bytes]) -> None:
        while chunk := await source.read(65536):
            target.write(chunk)
            await target.drain()

    reading = asyncio.create_task(read_input())
    hung_up = asyncio.create_task(process.channel.wait_closed())
    hung_up.add_done_callback(lambda _: kill(signal.SIGKILL))
    try:
        await asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
        status = await child.wait()
        if status < 0:
            process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
        else:
            process.exit(status)
    finally:
        await child.wait()
        reading.cancel()
        await asyncio.wait({reading})
        hung_up.cancel()


@contextlib.asynccontextmanager
async def running(keys: KeyPaths) -> AsyncIterator[Sshd]:
    """A running sshd that has the host key of ``keys`` and takes the user key."""
    server = Sshd(keys)
    acceptor = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=lambda: server,
        server_host_keys=[str(keys.host_key)],
        authorized_client_keys=str(public(keys.user_key)),
        process_factory=server.handle,
        encoding=None,
        gss_host=None,
    )
    server.port = acceptor.get_port()
    try:
        yield server
    finally:
        acceptor.close()
        for connection in server.connections:
            connection.abort()
        for connection in server.connections:
            await connection.wait_closed()
        await acceptor.wait_closed()


@pytest.fixture(scope="session")
def guest_keys(tmp_path_factory) -> KeyPaths:
    """A user key and a guest's host key."""
    keys = KeyPaths(tmp_path_factory.mktemp("keys"))
    make_keys(keys)
    return keys


@pytest.fixture
async def sshd(guest_keys) -> AsyncIterator[Sshd]:
    """A running sshd that takes the user key."""
    async with running(guest_keys) as server:
        yield server


@pytest.fixture
async def ssh(sshd) -> AsyncIterator[SSH]:
    """A client of that sshd."""
    client = sshd.client()
    yield client
    await client.close()


@pytest.fixture
def unused_port() -> int:
    """A TCP port of the loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
