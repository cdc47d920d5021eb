"""One ssh connection to the guest, kept open, with the host key pinned. The only user of asyncssh.

The user's own ssh configuration, agent and known_hosts play no part.
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
"""An emulated guest needs a while for the key exchange."""
KEEPALIVE_S = 30
CLOSE_TIMEOUT_S = 2.0
OPEN_TIMEOUT_S = 60.0
"""How long the guest may take to start a command."""
REACH_TIMEOUT_S = 60.0
REACH_AGAIN_S = 0.2
FOLLOW_UP_TIMEOUT_S = 60.0
"""For all that is done after each connect, before the connection is used."""
READ_BYTES = 64 * 1024
ANSWER_MAX_BYTES = 1 << 20
"""Output of a command of ours in the guest, which is a line or a few; one that gives more is ended."""
COLLECTED_MAX_BYTES = 64 << 20
"""The same for a command of the user's, unless the user chooses another limit."""
AGENT_SOCKET = "/run/ovm/ssh-agent.sock"
"""Where the user's ssh agent is in a guest that it is lent to."""

OnOutput = Callable[[bytes], object]
LISTEN_WINDOW_BYTES = 8 * 1024
"""What one connection made in the guest may have us hold before it is read."""
Handler = Callable[["asyncssh.SSHReader[bytes]", "asyncssh.SSHWriter[bytes]", int], Awaitable[None] | None]
"""Serves one connection made in the guest, or notes it; the number is the port it came from."""


def make_keys(keys: KeyPaths) -> None:
    """The user's key and the guest's host key (ed25519), made where they are missing.

    Raises:
        FileError: they cannot be written.
        UntrustedError: another user made their directory, or could change it.
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
        raise FileError(f"no ssh keys can be made in {keys.directory}: {error.strerror}") from error


class SSH:
    """The way into a guest. Connects when first needed, and again after the connection was lost."""

    def __init__(self, port: int, keys: KeyPaths, *, user: str = "root") -> None:
        self.port = port
        self._keys = keys
        self._user = user
        self._connection: asyncssh.SSHClientConnection | None = None
        self._connecting = asyncio.Lock()
        self._on_connect: list[Callable[[SSH], Awaitable[None]]] = []

    def on_connect(self, action: Callable[[SSH], Awaitable[None]]) -> None:
        """Have ``action`` done after every connect, before anything else."""
        self._on_connect.append(action)

    async def connect(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> asyncssh.SSHClientConnection:
        """Return the open connection, or make a new one.

        Raises:
            HostKeyMismatch: whoever answered is not our guest.
            GuestError: nobody answered within ``timeout_s`` seconds, or our key was refused.
        """
        async with self._connecting:
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._connect(timeout_s)
                try:
                    await self._follow_up()
                except BaseException:
                    await self.close()  # or the next caller would take it for one on which all has been done
                    raise
            return self._connection

    async def reach(self, *, timeout_s: float = REACH_TIMEOUT_S) -> None:
        """Connect, again and again until sshd answers.

        Raises:
            HostKeyMismatch: whoever answered is not our guest.
            GuestError: it has not answered within ``timeout_s`` seconds.
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
                f"the guest's sshd did not answer within {FOLLOW_UP_TIMEOUT_S:g} s of the connection"
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
                f"port {self.port} answered with a host key that is not this guest's",
                hint="another program may have taken the port; stop the machine and start it again",
            ) from tamed(error)
        except asyncssh.PermissionDenied as error:
            raise GuestError(
                f"the guest refused our key for {self._user}",
                hint="start the machine again: keys are handed over at boot",
            ) from tamed(error)
        except TimeoutError as error:
            raise GuestError(f"no ssh connection to the guest within {timeout_s:g} s") from error
        except (asyncssh.Error, OSError) as error:
            raise GuestError(f"no ssh connection to the guest: {GuestText.of(error)}") from tamed(error)
        except ValueError as error:  # asyncssh's, for a user without an account
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
        """Run a command in the guest; ``on_stdout`` and ``on_stderr`` get its output as it comes, uncollected.

        Raises:
            ExecTimeout: it ran longer than ``timeout_s`` seconds; it has been ended.
            GuestError: the guest cannot be reached, or there were more than ``max_output_bytes`` to collect; the
                command has been ended.
        """
        await warm_up()
        import asyncssh

        collected = Collected(argv, max_output_bytes)
        try:
            async with asyncio.timeout(timeout_s) as deadline:  # a guest that hangs may not even let us begin
                async with self.process(argv, environment=environment) as process:
                    with contextlib.suppress(OSError):  # a quick command may be over without having read anything
                        process.stdin.write(stdin)
                        process.stdin.write_eof()
                    await asyncio.gather(
                        _drain(process.stdout, on_stdout or collected.stdout),
                        _drain(process.stderr, on_stderr or collected.stderr),
                    )
                    await process.wait_closed()  # wait() would collect what follows without a limit
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
        """A command running in the guest, with its streams; ended on the way out. Raises as :meth:`exec` does."""
        async with _process(await self.connect(), argv, environment or {}) as process:
            yield process

    async def listen_in_guest(self, port: int, handler: Handler, *, release: Sequence[str]) -> None:
        """Serve connections made in the guest to its 127.0.0.1:``port``, for as long as the connection lasts.

        ``release`` is the guest's command that takes the port from a connection of ours that was lost unnoticed.

        Raises:
            GuestError: the guest refused.
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
            raise GuestError(f"the guest does not let us listen on its port {port}: {words}") from tamed(error)

    async def forward_port(self, first: int, guest_path: str) -> int:
        """Lead a port of the host's loopback, the first free one from ``first`` up, to a unix socket of the guest.

        It is opened anew whenever the connection is. Returns the port.

        Raises:
            PortError: none is free.
            GuestError: there is no connection.
        """
        connection = await self.connect()
        for port in range(first, 65536):
            with contextlib.suppress(OSError):  # taken
                await connection.forward_local_port_to_path("127.0.0.1", port, guest_path)
                break
        else:
            raise PortError(f"no tcp port of 127.0.0.1 is free from {first} up", hint="choose podman_tcp=False")

        async def open_again(ssh: SSH) -> None:
            assert ssh._connection is not None
            try:
                await ssh._connection.forward_local_port_to_path("127.0.0.1", port, guest_path)
            except OSError as error:
                raise GuestError(f"port {port} cannot be led to the guest's {guest_path}: {error.strerror}") from error

        self.on_connect(open_again)
        return port

    def lend_socket(self, path: Path, guest_path: str) -> None:
        """Lead the guest's unix socket ``guest_path``, which is root's alone, to the host's at ``path``.

        It is there after every connect, which fails with GuestError where the guest does not let us listen.
        """

        async def lend(ssh: SSH) -> None:
            import asyncssh

            assert ssh._connection is not None
            try:
                await ssh._connection.forward_remote_path(guest_path, os.fspath(path))
            except (asyncssh.Error, asyncssh.ChannelListenError, OSError) as error:
                words = GuestText.of(error)
                raise GuestError(f"the guest does not let us listen at its {guest_path}: {words}") from tamed(error)

        self.on_connect(lend)

    async def wait_lost(self) -> None:
        """Until there is no connection."""
        if self._connection is not None:
            await self._connection.wait_closed()

    async def close(self) -> None:
        """Hang up."""
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
            with contextlib.suppress(OSError):  # the connection may be gone
                process.kill()
        process.close()
        with contextlib.suppress(TimeoutError):  # a guest that hangs does not confirm it
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await process.wait_closed()


class Collected:
    """The output of one command, up to ``max_bytes`` of both streams together; raises GuestError for more."""

    def __init__(self, argv: Sequence[str], max_bytes: int | None) -> None:
        self._argv = argv
        self._max_bytes = max_bytes
        self._stdout, self._stderr = bytearray(), bytearray()

    @property
    def whole(self) -> tuple[bytes, bytes]:
        """Standard output and standard error."""
        return bytes(self._stdout), bytes(self._stderr)

    def stdout(self, piece: bytes) -> None:
        """Take a piece of standard output."""
        self._take(self._stdout, piece)

    def stderr(self, piece: bytes) -> None:
        """Take a piece of standard error."""
        self._take(self._stderr, piece)

    def _take(self, stream: bytearray, piece: bytes) -> None:
        stream += piece
        if self._max_bytes is not None and len(self._stdout) + len(self._stderr) > self._max_bytes:
            raise GuestError(
                f"{shlex.join(self._argv)!r} gave more than {self._max_bytes} bytes of output, and was ended",
                hint="take the output as it comes, or set max_output_bytes",
            )


async def converse(process: asyncssh.SSHClientProcess[bytes], request: bytes) -> bytes:
    """Write a line and read a whole one; empty if the process or the connection ended instead, or the line does not.

    There is no deadline here: the caller has one.
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
    """Import asyncssh in a thread: it takes a fifth of a second, best spent while the guest boots."""
    await asyncio.to_thread(import_module, "asyncssh")
