"""HTTP over a unix socket, JSON in and out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ovm.errors import OVMError
from ovm.text.printable import GuestText, tamed
from ovm.trust import peers
from ovm.wire import codec
from ovm.wire.error import WireError

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

REQUEST_TIMEOUT_S = 10.0
ANSWER_MAX_BYTES = 1 << 20
LINE_MAX_BYTES = 1 << 20
"""Size limit of one line of a response that is read line by line."""


class UnixHTTP:
    """A client of the server on one unix socket; :func:`connect` creates it."""

    def __init__(self, client: httpx2.AsyncClient, socket_path: Path) -> None:
        self._client = client
        self._extensions = {"trace": partial(_check_peer, socket_path)}

    async def get(self, path: str, answer: type[T], *, timeout_s: float = REQUEST_TIMEOUT_S) -> T:
        """Send GET ``path``; return the response, decoded as ``answer``.

        Raises:
            WireError: no response within ``timeout_s`` seconds, an error status, or a response that is no ``answer``.
        """
        content = await self._request("GET", path, None, timeout_s)
        try:
            return codec.decode(content, answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"GET {path}: unexpected response: {error}") from tamed(error)

    async def text(self, path: str, *, timeout_s: float = REQUEST_TIMEOUT_S) -> str:
        """Send GET ``path``; return the response as text. Raises like :meth:`get`."""
        return (await self._request("GET", path, None, timeout_s)).decode(errors="replace")

    async def post(self, path: str, body: Any, *, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
        """POST ``body`` as JSON; return the response. Raises like :meth:`get`."""
        return await self._request("POST", path, msgspec.json.encode(body), timeout_s)

    async def _request(self, method: str, path: str, content: bytes | None, timeout_s: float) -> bytes:
        import httpx2

        try:
            async with asyncio.timeout(timeout_s):  # the client's own timeouts apply to each piece
                request = self._client.stream(
                    method, f"http://localhost{path}", content=content, timeout=None, extensions=self._extensions
                )
                async with request as response:
                    answer = await _whole(response, f"{method} {path}")
        except TimeoutError as error:
            raise WireError(f"{method} {path}: no response within {timeout_s:g} s") from error
        except OVMError:  # some are also ValueErrors
            raise
        except (httpx2.HTTPError, ValueError) as error:  # ValueError, for example, for an invalid cookie
            raise WireError(f"{method} {path}: {GuestText.of(error)}") from tamed(error)
        if not response.is_success:
            raise _refusal(f"{method} {path}", response.status_code, answer)
        return answer

    @contextlib.asynccontextmanager
    async def lines(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield the response line by line as it arrives, without an overall timeout; close the connection on exit.

        Raises:
            WireError: it does not begin within ``timeout_s`` seconds, is incomplete, has a line of more than
                LINE_MAX_BYTES, or has an error status.
        """
        import httpx2

        content = None if body is None else msgspec.json.encode(body)
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(timeout_s):
                        response = await stack.enter_async_context(
                            self._client.stream(
                                method,
                                f"http://localhost{path}",
                                content=content,
                                timeout=None,
                                extensions=self._extensions,
                            )
                        )
                except TimeoutError as error:
                    raise WireError(f"{method} {path}: no response within {timeout_s:g} s") from error
                if not response.is_success:
                    raise await _refused(response, f"{method} {path}")
                yield _lines(response, f"{method} {path}")
        except OVMError:  # raised by the caller while it reads the lines
            raise
        except (httpx2.HTTPError, ValueError) as error:
            raise WireError(f"{method} {path}: {GuestText.of(error)}") from tamed(error)


async def _whole(response: httpx2.Response, what: str) -> bytes:
    answer = bytearray()
    async for piece in response.aiter_raw():  # raw: no compression was requested
        answer += piece
        if len(answer) > ANSWER_MAX_BYTES:
            raise WireError(f"{what}: a response of more than {ANSWER_MAX_BYTES} bytes")
    return bytes(answer)


async def _lines(response: httpx2.Response, what: str) -> AsyncIterator[bytes]:
    """Yield lines without LF or CRLF; other line separators may occur in JSON strings."""
    begun = b""
    async for piece in response.aiter_raw():
        *lines, begun = (begun + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if len(begun) > LINE_MAX_BYTES:
            raise WireError(f"{what}: a line of more than {LINE_MAX_BYTES} bytes")
    if begun:
        yield begun


async def _refused(response: httpx2.Response, what: str) -> WireError:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            answer = await _whole(response, what)
    except TimeoutError:
        return WireError(f"{what}: status {response.status_code}, incomplete after {REQUEST_TIMEOUT_S:g} s")
    return _refusal(what, response.status_code, answer)


def _refusal(what: str, status: int, answer: bytes) -> WireError:
    words = GuestText(answer.strip())
    return WireError(str(words) if words else f"{what}: status {status}", status, answer)


@contextlib.asynccontextmanager
async def connect(socket_path: Path) -> AsyncIterator[UnixHTTP]:
    """Create a client for ``socket_path``; it connects when needed and closes its connections on exit.

    Raises:
        UntrustedError: another user could replace the socket. Requests raise it if another user listens there.
    """
    import httpx2

    await asyncio.to_thread(peers.check_way, socket_path)
    transport = httpx2.AsyncHTTPTransport(uds=str(socket_path), verify=False)
    headers = {"accept-encoding": "identity"}
    async with httpx2.AsyncClient(transport=transport, trust_env=False, headers=headers) as client:
        yield UnixHTTP(client, socket_path)


async def _check_peer(socket_path: Path, event: str, told: dict[str, Any]) -> None:
    """Check the listening user once connected, before a byte is sent. httpx2 calls this at each step of a request."""
    if event != "connection.connect_unix_socket.complete":
        return
    stream = told["return_value"]
    try:
        peers.check_peer(stream.get_extra_info("socket"), socket_path)
    except BaseException:
        await stream.aclose()
        raise
