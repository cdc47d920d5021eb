"""A command in the guest with its three streams, for those who wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ovm.sync.loop import Loop

if TYPE_CHECKING:
    import asyncssh


class Writer:
    """What a command reads."""

    def __init__(self, loop: Loop, stream: asyncssh.SSHWriter[bytes]) -> None:
        self._loop, self._stream = loop, stream

    def write(self, content: bytes) -> None:
        """Send it; waits until there is room for more. Raises ``OSError`` if nobody reads it any more."""
        self._loop.call(self._stream.write, content)
        self._loop.run(self._stream.drain)

    def close(self) -> None:
        """Nothing more comes: the command reads an end of file."""
        self._loop.call(self._stream.write_eof)


class Reader:
    """What a command writes; its lines can be iterated over."""

    def __init__(self, loop: Loop, stream: asyncssh.SSHReader[bytes]) -> None:
        self._loop, self._stream = loop, stream

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, as soon as there are any; all there will ever be if it is negative."""
        return self._loop.run(self._stream.read, size)

    def readline(self) -> bytes:
        """The next line with its end; empty if there is none."""
        return self._loop.run(self._stream.readline)


class Process:
    """A command running as root in the guest; :meth:`OVM.process` makes one."""

    def __init__(self, loop: Loop, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._loop, self._process = loop, process
        self.stdin = Writer(loop, process.stdin)
        self.stdout = Reader(loop, process.stdout)
        self.stderr = Reader(loop, process.stderr)

    @property
    def returncode(self) -> int | None:
        """Its status, the signal's number below 0 if one ended it; ``None`` while it runs."""
        return self._process.returncode

    def wait(self) -> int | None:
        """Until it has ended; returns :attr:`returncode`. What it wrote beyond what was read is lost."""
        return self._loop.run(self._process.wait).returncode

    def send_signal(self, name: str) -> None:
        """Send it a signal by its name without SIG: ``INT``."""
        self._loop.call(self._process.send_signal, name)

    def terminate(self) -> None:
        """Ask it to end."""
        self._loop.call(self._process.terminate)

    def kill(self) -> None:
        """End it."""
        self._loop.call(self._process.kill)
