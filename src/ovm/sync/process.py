"""A command in the guest with its three streams, for the blocking API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ovm.sync.loop import Loop

if TYPE_CHECKING:
    import asyncssh


class Writer:
    """A command's standard input."""

    def __init__(self, loop: Loop, stream: asyncssh.SSHWriter[bytes]) -> None:
        self._loop, self._stream = loop, stream

    def write(self, content: bytes) -> None:
        """Send ``content``; blocks while the buffer is full. Raises ``OSError`` if the command reads no more."""
        self._loop.call(self._stream.write, content)
        self._loop.run(self._stream.drain)

    def close(self) -> None:
        """Send the end of file."""
        self._loop.call(self._stream.write_eof)


class Reader:
    """An output stream of a command; iterates over its lines."""

    def __init__(self, loop: Loop, stream: asyncssh.SSHReader[bytes]) -> None:
        self._loop, self._stream = loop, stream

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes, as soon as there are any; if it is negative, everything until the end."""
        return self._loop.run(self._stream.read, size)

    def readline(self) -> bytes:
        """Read the next line with its line end; empty at the end."""
        return self._loop.run(self._stream.readline)


class Process:
    """A command that runs as root in the guest; :meth:`OVM.process` returns one."""

    def __init__(self, loop: Loop, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._loop, self._process = loop, process
        self.stdin = Writer(loop, process.stdin)
        self.stdout = Reader(loop, process.stdout)
        self.stderr = Reader(loop, process.stderr)

    @property
    def returncode(self) -> int | None:
        """Exit status; negative signal number if a signal ended the command; ``None`` while it runs."""
        return self._process.returncode

    def wait(self) -> int | None:
        """Wait for the end and return :attr:`returncode`. Output that was not read is lost."""
        return self._loop.run(self._process.wait).returncode

    def send_signal(self, name: str) -> None:
        """Send a signal by its name without SIG: ``INT``."""
        self._loop.call(self._process.send_signal, name)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._loop.call(self._process.terminate)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._loop.call(self._process.kill)
