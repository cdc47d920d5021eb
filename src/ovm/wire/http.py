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
"""Of one line of an answer that is read line by line."""


class UnixHTTP:
    """A client of the server behind one unix socket; :func:`connect` makes one."""

    def __init__(self, client: httpx2.AsyncClient, socket_path: Path) -> None:
        self._client = client
        self._extensions = {"trace": partial(_check_peer, socket_path)}

    async def get(self, path: str, answer: type[T], *, timeout_s: float = REQUEST_TIMEOUT_S) -> T:
        """What GET ``path`` answers, decoded as ``answer``.

        Raises:
            WireError: no answer within ``timeout_s`` seconds, one without success, or not of that shape.
        """
        content = await self._request("GET", path, None, timeout_s)
        try:
            return codec.decode(content, answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"GET {path} answered something unexpected: {error}") from tamed(error)

    async def text(self, path: str, *, timeout_s: float = REQUEST_TIMEOUT_S) -> str:
        """What GET ``path`` answers, as text; raises as :meth:`get` does."""
        return (await self._request("GET", path, None, timeout_s)).decode(errors="replace")

    async def post(self, path: str, body: Any, *, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
        """POST ``body`` as JSON; raises as :meth:`get` does."""
        return await self._request("POST", path, msgspec.json.encode(body), timeout_s)

    async def _request(self, method: str, path: str, content: bytes | None, timeout_s: float) -> bytes:
        import httpx2

        try:
            async with asyncio.timeout(timeout_s):  # the client's own deadlines are for each piece alone
                request = self._client.stream(
                    method, f"http://localhost{path}", content=content, timeout=None, extensions=self._extensions
                )
                async with request as response:
                    answer = await _whole(response, f"{method} {path}")
        except TimeoutError as error:
            raise WireError(f"{method} {path}: no answer within {timeout_s:g} s") from error
        except OVMError:  # some are ValueErrors, too
            raise
        except (httpx2.HTTPError, ValueError) as error:  # the latter for a cookie that is none, for example
            raise WireError(f"{method} {path}: {GuestText.of(error)}") from tamed(error)
        if not response.is_success:
            raise _refusal(f"{method} {path}", response.status_code, answer)
        return answer

    @contextlib.asynccontextmanager
    async def lines(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The answer line by line as it comes, for as long as it takes; closes the connection on the way out.

        Raises:
            WireError: it did not begin within ``timeout_s`` seconds, breaks off, has a line of more than
                LINE_MAX_BYTES, or is none of success.
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
                    raise WireError(f"{method} {path}: no answer within {timeout_s:g} s") from error
                if not response.is_success:
                    raise await _refused(response, f"{method} {path}")
                yield _lines(response, f"{method} {path}")
        except OVMError:  # of whoever reads the lines
            raise
        except (httpx2.HTTPError, ValueError) as error:
            raise WireError(f"{method} {path}: {GuestText.of(error)}") from tamed(error)


async def _whole(response: httpx2.Response, what: str) -> bytes:
    answer = bytearray()
    async for piece in response.aiter_raw():  # nobody was asked to pack it
        answer += piece
        if len(answer) > ANSWER_MAX_BYTES:
            raise WireError(f"{what}: an answer of more than {ANSWER_MAX_BYTES} bytes")
    return bytes(answer)


async def _lines(response: httpx2.Response, what: str) -> AsyncIterator[bytes]:
    """Without their ends, which are LF or CRLF alone: JSON may have other separators of lines in its strings."""
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
        return WireError(f"{what}: status {response.status_code}, and no end within {REQUEST_TIMEOUT_S:g} s")
    return _refusal(what, response.status_code, answer)


def _refusal(what: str, status: int, answer: bytes) -> WireError:
    words = GuestText(answer.strip())
    return WireError(str(words) if words else f"{what}: status {status}", status, answer)


@contextlib.asynccontextmanager
async def connect(socket_path: Path) -> AsyncIterator[UnixHTTP]:
    """A client for ``socket_path``; connections are made when needed and closed on the way out.

    Raises:
        UntrustedError: another user could exchange the socket. Requests raise it if another user listens there.
    """
    import httpx2

    await asyncio.to_thread(peers.check_way, socket_path)
    transport = httpx2.AsyncHTTPTransport(uds=str(socket_path), verify=False)
    headers = {"accept-encoding": "identity"}
    async with httpx2.AsyncClient(transport=transport, trust_env=False, headers=headers) as client:
        yield UnixHTTP(client, socket_path)


async def _check_peer(socket_path: Path, event: str, told: dict[str, Any]) -> None:
    """Called by httpx2 at each step of a request: once connected, and before a byte is sent, look who listens."""
    if event != "connection.connect_unix_socket.complete":
        return
    stream = told["return_value"]
    try:
        peers.check_peer(stream.get_extra_info("socket"), socket_path)
    except BaseException:
        await stream.aclose()
        raise
