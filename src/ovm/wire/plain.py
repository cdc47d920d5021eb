"""HTTP over a unix socket for those who wait: without an event loop, and quick to import."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

from ovm.errors import UntrustedError
from ovm.text import GuestText, tamed
from ovm.trust import peers
from ovm.wire.error import WireError

REQUEST_TIMEOUT_S = 10.0
ANSWER_MAX_BYTES = 8 << 20


class _Connection(http.client.HTTPConnection):
    def __init__(self, socket_path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._socket_path = socket_path

    def connect(self) -> None:
        peers.check_way(self._socket_path)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._socket_path))
        peers.check_peer(self.sock, self._socket_path)


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
        if len(content) > ANSWER_MAX_BYTES:
            raise WireError(f"{self._what}: an answer of more than {ANSWER_MAX_BYTES} bytes")
        return content

    def lines(self) -> Iterator[bytes]:
        """Line by line as they come, without their ends; raises as :meth:`read` does."""
        with _wire_errors(self._what):
            while line := self._response.readline(ANSWER_MAX_BYTES):
                yield line.rstrip(b"\r\n")


@contextlib.contextmanager
def request(
    socket_path: Path,
    method: str,
    path: str,
    content: bytes | None = None,
    *,
    timeout_s: float | None = REQUEST_TIMEOUT_S,
) -> Iterator[Answer]:
    """Ask the server behind ``socket_path``; hangs up on the way out.

    Nothing is sent to, or believed of, a server of another user.

    ``timeout_s`` counts for each silence, in seconds; ``None`` waits for ever.

    Raises:
        WireError: nobody listens there, or nothing came back.
        UntrustedError: another user listens there, or could exchange the socket.
    """
    what = f"{method} {path}"
    headers = {"accept-encoding": "identity"} | ({"content-type": "application/json"} if content is not None else {})
    with contextlib.closing(_Connection(socket_path, timeout_s)) as connection:
        with _wire_errors(what):
            connection.request(method, path, content, headers)
            response = connection.getresponse()
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
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WireError(f"{what}: {GuestText.of(error)}") from tamed(error)
