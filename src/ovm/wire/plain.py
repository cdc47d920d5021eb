"""Blocking HTTP over a unix socket: no event loop, and quick to import."""

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
    """A unix socket with one deadline for all that it sends and receives; ``None`` means no deadline."""

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
        """Set the next call's timeout to the time left."""
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
    """A response: its status, and its body, whole or line by line."""

    def __init__(self, response: http.client.HTTPResponse, what: str) -> None:
        self._response = response
        self._what = what
        self.status = response.status

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    def header(self, name: str) -> str:
        """Return the header ``name``; empty if there is none."""
        return self._response.headers.get(name, "")

    def read(self) -> bytes:
        """Read the whole body.

        Raises:
            WireError: it is incomplete or too long.
        """
        with _wire_errors(self._what):
            content = self._response.read(ANSWER_MAX_BYTES + 1)
            if len(content) <= ANSWER_MAX_BYTES:
                self._check_end()
        if len(content) > ANSWER_MAX_BYTES:
            raise WireError(f"{self._what}: a response of more than {ANSWER_MAX_BYTES} bytes")
        return content

    def lines(self) -> Iterator[bytes]:
        """Yield the lines as they arrive, without line ends. Raises like :meth:`read`."""
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
        """Refuse an incomplete body of known length; http.client only detects an incomplete chunked one."""
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
    """Send a request to the server on ``socket_path``; close the connection on exit.

    A server of another user is refused before anything is sent.

    Args:
        socket_path: The unix socket.
        method: ``GET`` or ``POST``.
        path: The path to request.
        content: The body, as JSON.
        timeout_s: Timeout of the request and its whole response, in seconds.
        endless: Apply the timeout only to the response's head, not to its body.

    Raises:
        WireError: nothing listens there, or there was no response in time.
        UntrustedError: another user listens there, or could replace the socket.
    """
    what = f"{method} {path}"
    headers = {"accept-encoding": "identity"} | ({"content-type": "application/json"} if content is not None else {})
    with _wire_errors(what):
        connection = _Connection(socket_path, timeout_s)
    with contextlib.closing(connection):
        sock = connection.sock  # the connection drops it when the response is its last
        with _wire_errors(what):
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            if response.length is None and not response.chunked:  # an incomplete head looks the same
                raise http.client.IncompleteRead(b"")
        if endless:
            sock.deadline = None
        with contextlib.closing(response):
            yield Answer(response, what)


@contextlib.contextmanager
def _wire_errors(what: str) -> Iterator[None]:
    try:
        yield
    except UntrustedError:  # it is also a ValueError
        raise
    except TimeoutError as error:
        raise WireError(f"{what}: no response in time") from error
    except http.client.IncompleteRead as error:
        raise WireError(f"{what}: the response is incomplete") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WireError(f"{what}: {GuestText.of(error)}") from tamed(error)
