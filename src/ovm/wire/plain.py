"""HTTP over a unix socket for those who wait: without an event loop, and quick to import."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovm.errors import UntrustedError
from ovm.text.printable import GuestText, tamed
from ovm.trust import peers
from ovm.wire.error import WireError

REQUEST_TIMEOUT_S = 10.0
ANSWER_MAX_BYTES = 8 << 20
READ_BYTES = 64 << 10


class _Socket(socket.socket):
    """A unix socket with one deadline for all that is sent and received; ``None`` is no deadline."""

    deadline: float | None = None

    def sendall(self, *args: Any) -> None:
        self._hurry()
        super().sendall(*args)

    def recv_into(self, *args: Any) -> int:
        self._hurry()
        return super().recv_into(*args)

    def connect(self, address: Any) -> None:
        self._hurry()
        super().connect(address)

    def _hurry(self) -> None:
        """Give the next call what is left of the time."""
        if self.deadline is None:
            self.settimeout(None)
            return
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left)


class _Connection(http.client.HTTPConnection):
    def __init__(self, socket_path: Path, timeout_s: float) -> None:
        super().__init__("localhost")
        self._socket_path = socket_path
        self.sock: _Socket = _Socket(socket.AF_UNIX)
        self.sock.deadline = time.monotonic() + timeout_s
        try:
            peers.check_way(socket_path)
            self.sock.connect(str(socket_path))
            peers.check_peer(self.sock, socket_path)
        except BaseException:
            self.sock.close()
            raise


class Answer:
    """A status and what follows it, whole or piece by piece."""

    def __init__(self, response: http.client.HTTPResponse, what: str) -> None:
        self._response = response
        self._what = what
        self.status = response.status

    @property
    def is_success(self) -> bool:
        """Whether the server did as asked."""
        return 200 <= self.status < 300

    def header(self, name: str) -> str:
        """What the header ``name`` says; empty if there is none."""
        return self._response.headers.get(name, "")

    def read(self) -> bytes:
        """All of it.

        Raises:
            WireError: it breaks off, or has no end.
        """
        with _wire_errors(self._what):
            content = self._response.read(ANSWER_MAX_BYTES + 1)
            if len(content) <= ANSWER_MAX_BYTES:
                self._check_end()
        if len(content) > ANSWER_MAX_BYTES:
            raise WireError(f"{self._what}: an answer of more than {ANSWER_MAX_BYTES} bytes")
        return content

    def lines(self) -> Iterator[bytes]:
        """Line by line as they come, without their ends; raises as :meth:`read` does."""
        begun = b""
        with _wire_errors(self._what):
            while piece := self._response.read1(READ_BYTES):
                *lines, begun = (begun + piece).split(b"\n")
                for line in lines:
                    yield line.rstrip(b"\r")
                if len(begun) > ANSWER_MAX_BYTES:
                    raise WireError(f"{self._what}: a line of more than {ANSWER_MAX_BYTES} bytes")
            self._check_end()
        if begun:
            yield begun

    def _check_end(self) -> None:
        """Of a body in chunks, reading notices itself that it breaks off; of one of known length it does not."""
        if self._response.length:
            raise http.client.IncompleteRead(b"", self._response.length)


@contextlib.contextmanager
def request(
    socket_path: Path,
    method: str,
    path: str,
    content: bytes | None = None,
    *,
    timeout_s: float = REQUEST_TIMEOUT_S,
    endless: bool = False,
) -> Iterator[Answer]:
    """Send a request to the server behind ``socket_path``; closes the connection on the way out.

    Nothing is sent to, or believed of, a server of another user.

    Args:
        socket_path: The unix socket.
        method: ``GET`` or ``POST``.
        path: What is requested.
        content: The body, which is JSON.
        timeout_s: Seconds for the request and its whole answer, however slowly it comes.
        endless: The deadline is for the head of the answer alone: the rest may take as long as it likes.

    Raises:
        WireError: nobody listens there, or nothing came back in time.
        UntrustedError: another user listens there, or could exchange the socket.
    """
    what = f"{method} {path}"
    headers = {"accept-encoding": "identity"} | ({"content-type": "application/json"} if content is not None else {})
    with _wire_errors(what):
        connection = _Connection(socket_path, timeout_s)
    with contextlib.closing(connection):
        sock = connection.sock  # the connection forgets it when the answer is to be its last
        with _wire_errors(what):
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            if response.length is None and not response.chunked:  # a head that breaks off is none without an end, too
                raise http.client.IncompleteRead(b"")
        if endless:
            sock.deadline = None
        with contextlib.closing(response):
            yield Answer(response, what)


@contextlib.contextmanager
def _wire_errors(what: str) -> Iterator[None]:
    try:
        yield
    except UntrustedError:  # which is a ValueError, too
        raise
    except TimeoutError as error:
        raise WireError(f"{what}: no answer in time") from error
    except http.client.IncompleteRead as error:
        raise WireError(f"{what}: the answer breaks off") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WireError(f"{what}: {GuestText.of(error)}") from tamed(error)
