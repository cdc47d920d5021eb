"""One ssh connection to the guest, kept open, with the host key pinned. The only user of asyncssh.

Ignores the user's own ssh configuration, agent and known_hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovm.errors import ExecTimeout, FileError, GuestError, HostKeyMismatch, PortError
from ovm.model.results import ExecResult
from ovm.paths import KeyPaths, public
from ovm.text.printable import GuestText, tamed
from ovm.trust import directories
from ovm.trust.atomic import write_whole

if TYPE_CHECKING:
    import asyncssh

CONNECT_TIMEOUT_S = 30.0
"""Long, because the key exchange is slow in an emulated guest."""
KEEPALIVE_S = 30
CLOSE_TIMEOUT_S = 2.0
OPEN_TIMEOUT_S = 60.0
"""Timeout for starting a command in the guest."""
REACH_TIMEOUT_S = 60.0
REACH_AGAIN_S = 0.2
FOLLOW_UP_TIMEOUT_S = 60.0
"""Timeout for all ``on_connect`` actions together."""
READ_BYTES = 64 * 1024
ANSWER_MAX_BYTES = 1 << 20
"""Output limit of the manager's own commands in the guest, which print a few lines; beyond it they are killed."""
COLLECTED_MAX_BYTES = 64 << 20
"""The default limit for the user's commands."""
AGENT_SOCKET = "/run/ovm/ssh-agent.sock"
"""Path of the user's forwarded ssh agent in the guest."""

OnOutput = Callable[[bytes], object]
LISTEN_WINDOW_BYTES = 8 * 1024
"""Bytes that one connection made in the guest can have buffered on the host before they are read."""
Handler = Callable[["asyncssh.SSHReader[bytes]", "asyncssh.SSHWriter[bytes]", int], Awaitable[None] | None]
"""Serves or queues one connection made in the guest; the number is its source port."""


def make_keys(keys: KeyPaths) -> None:
    """Create the user's key and the guest's host key (ed25519) where they are missing.

    Raises:
        FileError: they cannot be written.
        UntrustedError: another user owns their directory, or could change it.
    """
    import asyncssh

    try:
        directories.make(keys.directory, private=True)
        for path, comment in ((keys.user_key, "ovm"), (keys.host_key, "ovm guest")):
            if not (path.exists() and public(path).exists()):
                key = asyncssh.generate_private_key("ssh-ed25519", comment=comment)
                write_whole(public(path), key.export_public_key(), 0o600)
                write_whole(path, key.export_private_key(), 0o600)
    except OSError as error:
        raise FileError(f"ssh keys cannot be created in {keys.directory}: {error.strerror}") from error


class SSH:
    """The ssh connection to a guest. Connects on first use, and again after the connection is lost."""

    def __init__(self, port: int, keys: KeyPaths, *, user: str = "root") -> None:
        self.port = port
        self._keys = keys
        self._user = user
        self._connection: asyncssh.SSHClientConnection | None = None
        self._connecting = asyncio.Lock()
        self._on_connect: list[Callable[[SSH], Awaitable[None]]] = []

    def on_connect(self, action: Callable[[SSH], Awaitable[None]]) -> None:
        """Run ``action`` after every connect, before any other use of the connection."""
        self._on_connect.append(action)

    async def connect(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> asyncssh.SSHClientConnection:
        """Return the open connection; connect if there is none.

        Raises:
            HostKeyMismatch: the server does not have the guest's host key.
            GuestError: sshd did not answer within ``timeout_s`` seconds, or rejected the user key.
        """
        async with self._connecting:
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._connect(timeout_s)
                try:
                    await self._follow_up()
                except BaseException:
                    await self.close()  # or the next caller would reuse a connection whose actions have not all run
                    raise
            return self._connection

    async def reach(self, *, timeout_s: float = REACH_TIMEOUT_S) -> None:
        """Connect, retrying until sshd answers.

        Raises:
            HostKeyMismatch: the server does not have the guest's host key.
            GuestError: sshd did not answer within ``timeout_s`` seconds.
        """
        last = GuestError(f"no ssh connection to the guest within {timeout_s:g} s")
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        await self.connect()
                    except HostKeyMismatch:
                        raise
                    except GuestError as error:
                        last = error
                        await asyncio.sleep(REACH_AGAIN_S)
                    else:
                        return
        except TimeoutError:
            raise last from None

    async def _follow_up(self) -> None:
        try:
            async with asyncio.timeout(FOLLOW_UP_TIMEOUT_S):
                for action in self._on_connect:
                    await action(self)
        except TimeoutError:
            raise GuestError(
                f"the guest's sshd did not answer within {FOLLOW_UP_TIMEOUT_S:g} s after connecting"
            ) from None

    async def _connect(self, timeout_s: float) -> asyncssh.SSHClientConnection:
        await warm_up()
        import asyncssh

        host_key = await asyncio.to_thread(asyncssh.read_public_key, public(self._keys.host_key))
        try:
            async with asyncio.timeout(timeout_s):
                connection = await asyncssh.connect(
                    "127.0.0.1",
                    self.port,
                    username=self._user,
                    client_keys=[str(self._keys.user_key)],
                    known_hosts=([host_key], [], []),
                    server_host_key_algs=["ssh-ed25519"],
                    kex_algs=["curve25519-sha256"],
                    compression_algs=None,
                    preferred_auth="publickey",
                    agent_path=None,
                    config=None,
                    keepalive_interval=KEEPALIVE_S,
                    keepalive_count_max=4,
                )
        except asyncssh.HostKeyNotVerifiable as error:
            raise HostKeyMismatch(
                f"the ssh server on port {self.port} does not have this guest's host key",
                hint="stop the machine and start it again: another program may use the port",
            ) from tamed(error)
        except asyncssh.PermissionDenied as error:
            raise GuestError(
                f"the guest rejected the ssh key of ovm for {self._user}",
                hint="restart the machine: the guest gets its keys at boot",
            ) from tamed(error)
        except TimeoutError as error:
            raise GuestError(f"no ssh connection to the guest within {timeout_s:g} s") from error
        except (asyncssh.Error, OSError) as error:
            raise GuestError(f"no ssh connection to the guest: {GuestText.of(error)}") from tamed(error)
        except ValueError as error:  # asyncssh raises it for a host user without an account
            raise GuestError(
                f"no ssh connection to the guest: {error}", hint="set LOGNAME in the environment"
            ) from error
        return connection

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        on_stdout: OnOutput | None = None,
        on_stderr: OnOutput | None = None,
        max_output_bytes: int | None = ANSWER_MAX_BYTES,
    ) -> ExecResult:
        """Run a command in the guest. ``on_stdout`` and ``on_stderr`` get its output as it arrives, uncollected.

        Raises:
            ExecTimeout: it ran longer than ``timeout_s`` seconds and was killed.
            GuestError: the guest cannot be reached, or the command printed more than ``max_output_bytes`` and was
                killed.
        """
        await warm_up()
        import asyncssh

        collected = Collected(argv, max_output_bytes)
        try:
            async with asyncio.timeout(timeout_s) as deadline:  # a guest that hangs may not even start the command
                async with self.process(argv, environment=environment) as process:
                    with contextlib.suppress(OSError):  # a quick command may exit without reading its input
                        process.stdin.write(stdin)
                        process.stdin.write_eof()
                    await asyncio.gather(
                        _drain(process.stdout, on_stdout or collected.stdout),
                        _drain(process.stderr, on_stderr or collected.stderr),
                    )
                    await process.wait_closed()  # wait() would collect further output without a limit
                    status = process.returncode
        except (asyncssh.Error, OSError) as error:
            if deadline.expired():
                raise ExecTimeout(f"{shlex.join(argv)!r} ran longer than {timeout_s:g} s in the guest") from None
            raise GuestError(f"the connection to the guest was lost: {GuestText.of(error)}") from tamed(error)
        if status is None:
            raise GuestError(f"the connection was lost before {shlex.join(argv)!r} ended")
        return ExecResult(128 - status if status < 0 else status, *collected.whole)

    @contextlib.asynccontextmanager
    async def process(
        self, argv: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
        """Start a command in the guest and yield it with its streams; kill it on exit. Raises as :meth:`exec` does."""
        async with _process(await self.connect(), argv, environment or {}) as process:
            yield process

    async def listen_in_guest(self, port: int, handler: Handler, *, release: Sequence[str]) -> None:
        """Serve connections made in the guest to its 127.0.0.1:``port`` while the ssh connection lasts.

        ``release`` is the guest's command that frees the port if a lost ssh connection still holds it.

        Raises:
            GuestError: the guest rejected the listener.
        """
        await warm_up()
        import asyncssh

        assert self._connection is not None

        def accept(_host: str, from_port: int) -> Any:
            return lambda reader, writer: handler(reader, writer, from_port)

        listen = partial(
            self._connection.start_server, accept, "127.0.0.1", port, encoding=None, window=LISTEN_WINDOW_BYTES
        )
        try:
            try:
                await listen()
            except asyncssh.ChannelListenError:
                async with _process(self._connection, release, {}) as process:
                    await process.wait_closed()
                await listen()
        except (asyncssh.Error, asyncssh.ChannelListenError, OSError) as error:
            words = GuestText.of(error)
            raise GuestError(f"ovm cannot listen on the guest's port {port}: {words}") from tamed(error)

    async def forward_port(self, first: int, guest_path: str) -> int:
        """Forward the first free port of the host's loopback, from ``first`` up, to a unix socket of the guest.

        The forward is restored after each reconnect. Returns the port.

        Raises:
            PortError: no port is free.
            GuestError: the guest cannot be reached.
        """
        connection = await self.connect()
        for port in range(first, 65536):
            with contextlib.suppress(OSError):  # taken
                await connection.forward_local_port_to_path("127.0.0.1", port, guest_path)
                break
        else:
            raise PortError(f"no TCP port of 127.0.0.1 is free from {first} up", hint="set podman_tcp=False")

        async def open_again(ssh: SSH) -> None:
            assert ssh._connection is not None
            try:
                await ssh._connection.forward_local_port_to_path("127.0.0.1", port, guest_path)
            except OSError as error:
                words = f"port {port} cannot be forwarded to the guest's {guest_path}: {error.strerror}"
                raise GuestError(words) from error

        self.on_connect(open_again)
        return port

    def lend_socket(self, path: Path, guest_path: str) -> None:
        """Forward the guest's unix socket ``guest_path``, which only root can use, to the host's socket at ``path``.

        Every connect restores it, and raises GuestError if the guest rejects the listener.
        """

        async def lend(ssh: SSH) -> None:
            import asyncssh

            assert ssh._connection is not None
            try:
                await ssh._connection.forward_remote_path(guest_path, os.fspath(path))
            except (asyncssh.Error, asyncssh.ChannelListenError, OSError) as error:
                words = GuestText.of(error)
                raise GuestError(f"ovm cannot listen on the guest's {guest_path}: {words}") from tamed(error)

        self.on_connect(lend)

    async def wait_lost(self) -> None:
        """Wait until the connection is lost or closed."""
        if self._connection is not None:
            await self._connection.wait_closed()

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


@contextlib.asynccontextmanager
async def _process(
    connection: asyncssh.SSHClientConnection, argv: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
    await warm_up()
    import asyncssh

    words = [*(["env", *(f"{k}={v}" for k, v in environment.items())] if environment else []), *argv]
    failed = f"{shlex.join(argv)!r} could not be started in the guest"
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            process: asyncssh.SSHClientProcess[bytes] = await connection.create_process(
                shlex.join(words), encoding=None
            )
    except TimeoutError:
        raise GuestError(f"{failed} within {OPEN_TIMEOUT_S:g} s") from None
    except (asyncssh.Error, OSError) as error:
        raise GuestError(f"{failed}: {GuestText.of(error)}") from tamed(error)
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(OSError):  # the connection may be lost
                process.kill()
        process.close()
        with contextlib.suppress(TimeoutError):  # a guest that hangs does not confirm the close
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await process.wait_closed()


class Collected:
    """The output of one command; raises GuestError if both streams exceed ``max_bytes`` together."""

    def __init__(self, argv: Sequence[str], max_bytes: int | None) -> None:
        self._argv = argv
        self._max_bytes = max_bytes
        self._stdout, self._stderr = bytearray(), bytearray()

    @property
    def whole(self) -> tuple[bytes, bytes]:
        """Standard output and standard error."""
        return bytes(self._stdout), bytes(self._stderr)

    def stdout(self, piece: bytes) -> None:
        """Add a piece of standard output."""
        self._take(self._stdout, piece)

    def stderr(self, piece: bytes) -> None:
        """Add a piece of standard error."""
        self._take(self._stderr, piece)

    def _take(self, stream: bytearray, piece: bytes) -> None:
        stream += piece
        if self._max_bytes is not None and len(self._stdout) + len(self._stderr) > self._max_bytes:
            raise GuestError(
                f"{shlex.join(self._argv)!r} printed more than {self._max_bytes} bytes and was killed",
                hint="stream the output with on_stdout and on_stderr, or set max_output_bytes",
            )


async def converse(process: asyncssh.SSHClientProcess[bytes], request: bytes) -> bytes:
    """Write a line and read one; return b"" if the process or the connection ends before the whole line arrives.

    The caller sets the deadline.
    """
    import asyncssh

    try:
        process.stdin.write(request + b"\n")
        answer = await process.stdout.readline()
    except (asyncssh.Error, OSError):
        return b""
    return answer if answer.endswith(b"\n") else b""


async def _drain(reader: asyncssh.SSHReader[bytes], consumer: OnOutput) -> None:
    while chunk := await reader.read(READ_BYTES):
        consumer(chunk)


async def warm_up() -> None:
    """Import asyncssh in a thread: the import takes 0.2 s, best spent while the guest boots."""
    await asyncio.to_thread(import_module, "asyncssh")
