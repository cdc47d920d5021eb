"""Download of one large file: resumed after a break, no larger than announced, its digest computed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import msgspec

from ovm._version import __version__
from ovm.errors import ImageError
from ovm.image.place import check_space
from ovm.process.threads import in_thread
from ovm.text.redaction import Redactor, credentials_of, shown_url
from ovm.trust.atomic import disk_errors, write_at, write_whole
from ovm.trust.files import read_file

if TYPE_CHECKING:
    import httpx2

CONNECT_TIMEOUT_S = 30.0
SILENCE_TIMEOUT_S = 60.0
"""Timeout of each piece of a response; the whole download has none."""
ATTEMPTS = 5
"""Number of attempts in a row without progress."""
BACKOFF_S = 1.0
"""Delay after the first of them; doubled after each further one."""
REDIRECTS_MAX = 10
SIZE_MAX_BYTES = 4 * 1024**3

PARTIAL = "download"
"""The partial file; the next download of the same file resumes it."""
NOTE = "download.json"

NOTE_MAX_BYTES = 64 * 1024
_WRITE_BYTES = 1024 * 1024
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TRY_AGAIN = frozenset({408, 425, 429})
"""Statuses to retry, besides 5xx."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)")
_CONTENT_LENGTH = re.compile("[0-9]{1,19}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The file to fetch, and its known properties."""

    url: str
    sha256: str = ""
    size: int = 0
    """In bytes; 0 if only the server knows it."""


def url_complaint(url: str, *, has_digest: bool) -> str:
    """Return why ``url`` is refused; empty if it may be used."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:  # its message quotes parts of the URL, such as a password
        return "it is not an http or https URL"
    if parts.scheme not in {"http", "https"} or not host:
        return "it is not an http or https URL"
    if parts.scheme == "http" and not has_digest and host not in _LOOPBACK:
        return "plain http does not prove where the content comes from"
    return ""


def discard(directory: Path) -> None:
    """Delete the partial file and its note."""
    for name in (PARTIAL, NOTE):
        (directory / name).unlink(missing_ok=True)


async def download(
    wanted: Wanted, directory: Path, *, room: int = 0, progress: Callable[[int, int], object] | None = None
) -> Path:
    """Fetch a file into ``directory``, which no one else may use meanwhile.

    If it fails or is cancelled, the partial file stays as ``download``, and the next call resumes it.

    Args:
        wanted: The file.
        directory: Target directory.
        room: Bytes that must remain free beside it.
        progress: Called in the event loop with the bytes done and the total.

    Raises:
        ImageError: it cannot be fetched, or has another digest and is deleted.
        SpaceError: the file system has too little space.
        FileError: it cannot be written.
    """
    stop = Event()
    with disk_errors(f"{directory} cannot be written to"):
        part = _Partial(directory, wanted)
        try:
            await in_thread(partial(part.take_up, stop), stop)
            client = await in_thread(_client)
            async with client:
                await _fetch_persistently(client, part, room, progress or (lambda _done, _total: None))
        finally:
            part.close()
        if wanted.sha256 and part.sha256 != wanted.sha256:
            await in_thread(partial(discard, directory))
            raise ImageError(
                f"{shown_url(wanted.url)} has the SHA-256 {part.sha256} instead of {wanted.sha256}",
                hint="check the URL and the digest: the file is damaged, or another one",
            )
    return part.path


class _DroppedError(Exception):
    """The attempt did not complete the file, and another one may."""


class _Note(msgspec.Struct, frozen=True):
    """Identifies the file that the partial file belongs to."""

    key: str = ""
    size: Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX_BYTES)] = 0
    validator: Annotated[str, msgspec.Meta(pattern=r"\A[ -~]{0,1000}\Z")] = ""
    """The server's validator of this content, for If-Range."""


class _Partial:
    """The partial file, and its digest so far."""

    def __init__(self, directory: Path, wanted: Wanted) -> None:
        self.wanted = wanted
        self.path = directory / PARTIAL
        self._note_path = directory / NOTE
        # a digest identifies the content whatever its URL; the URL may contain a secret, so only its digest is stored
        key = wanted.sha256 or f"url {hashlib.sha256(wanted.url.encode()).hexdigest()}"
        self.note = self._noted(key)
        self._digest = hashlib.sha256()
        self.size = 0
        usable = self.note.size and (self.note.validator or wanted.sha256) and self.path.exists()
        self._file = self.path.open("r+b" if usable else "w+b", buffering=0)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def is_whole(self) -> bool:
        return 0 < self.note.size == self.size

    def take_up(self, stop: Event) -> None:
        """Read and hash what an earlier run left."""
        while (data := self._file.read(_WRITE_BYTES)) and not stop.is_set():
            self._digest.update(data)
            self.size += len(data)
        if self.size > self.note.size:
            self.clear()

    def begin(self, size: int, validator: str) -> None:
        """Start over with the server's current content."""
        self.clear()  # before the note, so that a kill between the two does not pair it with old content
        self.note = _Note(self.note.key, size, validator)
        write_whole(self._note_path, msgspec.json.encode(self.note), 0o600)

    def write(self, data: bytes) -> None:
        write_at(self._file.fileno(), data, self.size)
        self._digest.update(data)
        self.size += len(data)

    def close(self) -> None:
        self._file.close()
        if not self.size:
            discard(self.path.parent)

    def _noted(self, key: str) -> _Note:
        try:
            note = msgspec.json.decode(read_file(self._note_path, NOTE_MAX_BYTES), type=_Note)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return _Note(key)
        if note.key != key or (self.wanted.size and note.size != self.wanted.size):
            return _Note(key)
        return note

    def clear(self) -> None:
        self._file.truncate(0)
        self._digest = hashlib.sha256()
        self.size = 0


def _client() -> httpx2.AsyncClient:
    import httpx2

    try:
        return httpx2.AsyncClient(
            timeout=httpx2.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            headers={"User-Agent": f"ovm/{__version__}", "Accept-Encoding": "identity"},
            # loopback is trusted because nothing is in between; so no proxy either
            mounts={f"all://[{host}]" if ":" in host else f"all://{host}": None for host in _LOOPBACK},
        )
    except (OSError, ValueError, ImportError, httpx2.InvalidURL) as error:
        raise ImageError(
            f"the proxy or the certificates of the environment cannot be used: {_without_proxies(error)}",
            hint="check http_proxy, https_proxy, all_proxy, SSL_CERT_FILE and SSL_CERT_DIR",
        ) from error


def _without_proxies(error: Exception) -> str:
    """Return the message of ``error`` without the credentials of the environment's proxies."""
    from urllib.request import getproxies

    return Redactor(secret for proxy in getproxies().values() for secret in credentials_of(proxy))(str(error))


async def _fetch_persistently(
    client: httpx2.AsyncClient, part: _Partial, room: int, progress: Callable[[int, int], object]
) -> None:
    furthest, failures = part.size, 0
    while not (part.is_whole and part.wanted.sha256):
        try:
            await _fetch(client, part, room, progress)
        except _DroppedError as error:
            if part.size > furthest:  # compared with the furthest: a server that cannot resume starts over each time
                furthest, failures = part.size, 0
            failures += 1
            if failures == ATTEMPTS:
                raise ImageError(
                    f"{shown_url(part.wanted.url)} cannot be fetched: {error}",
                    hint="pull again: the part so far is kept" if part.size else "check the URL and the network",
                ) from error
            await asyncio.sleep(BACKOFF_S * 2 ** (failures - 1))
        else:
            return


async def _fetch(client: httpx2.AsyncClient, part: _Partial, room: int, progress: Callable[[int, int], object]) -> None:
    """Make one attempt, from the end of the last one."""
    import httpx2

    try:
        async with _answer(client, part) as response:
            if response.status_code == HTTPStatus.NOT_MODIFIED and part.is_whole:
                return
            await in_thread(partial(_accept, response, part))
            check_space(part.path.parent, part.note.size - part.size + room)
            progress(part.size, part.note.size)
            await _receive(response, part, progress)
    except httpx2.InvalidURL as error:
        raise ImageError(f"{shown_url(part.wanted.url)} is not a URL") from error  # the error quotes it
    except httpx2.RequestError as error:
        if certificate := _certificate_problem(error):
            raise ImageError(
                f"{shown_url(part.wanted.url)}: the server's certificate is not trusted: {certificate}",
                hint="set SSL_CERT_FILE to the certificate authority of your proxy, if it intercepts TLS",
            ) from error
        raise _DroppedError(_without_proxies(error) or type(error).__name__) from error
    if not part.is_whole:
        raise _DroppedError(f"it ended after {part.size} of {part.note.size} bytes")


@contextlib.asynccontextmanager
async def _answer(client: httpx2.AsyncClient, part: _Partial) -> AsyncIterator[httpx2.Response]:
    """Follow all redirects to the response. It reads none of their bodies; each hop must be as safe as the first."""
    request = client.build_request("GET", part.wanted.url, headers=_conditions(part))
    for _ in range(REDIRECTS_MAX + 1):
        response = await client.send(request, stream=True)
        async with contextlib.aclosing(response):
            if not response.has_redirect_location:
                yield response
                return
        if response.next_request is None:
            raise ImageError(f"{shown_url(part.wanted.url)} redirects to an invalid URL")
        request = response.next_request
        if why := url_complaint(str(request.url), has_digest=bool(part.wanted.sha256)):
            raise ImageError(f"{shown_url(part.wanted.url)} redirects to {shown_url(str(request.url))}: {why}")
    raise ImageError(f"{shown_url(part.wanted.url)} redirects more than {REDIRECTS_MAX} times")


def _conditions(part: _Partial) -> dict[str, str]:
    validator = part.note.validator
    if not part.size:
        return {}
    if part.is_whole:
        return {"If-None-Match" if validator.startswith('"') else "If-Modified-Since": validator}
    return {"Range": f"bytes={part.size}-"} | ({"If-Range": validator} if validator else {})


def _accept(response: httpx2.Response, part: _Partial) -> None:
    """Prepare the partial file for the response's body."""
    status = response.status_code
    if status == HTTPStatus.PARTIAL_CONTENT:
        told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if told is None or int(told[1]) != part.size or told[2] not in {str(part.note.size), "*"}:
            part.clear()
            raise _DroppedError("the server resumes at another offset than requested")
        return
    if status != HTTPStatus.OK:
        answer = f"the server responds {status} {response.reason_phrase}".rstrip()
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.clear()
        elif status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _TRY_AGAIN:
            raise ImageError(f"{shown_url(part.wanted.url)}: {answer}", hint="check the URL")
        raise _DroppedError(answer)
    part.begin(_size(response, part.wanted), _validator(response))


def _size(response: httpx2.Response, wanted: Wanted) -> int:
    told = response.headers.get("Content-Length", "")
    size = int(told) if _CONTENT_LENGTH.fullmatch(told) else wanted.size
    if not size:
        raise ImageError(f"{shown_url(wanted.url)}: the server does not report the size", hint="use another server")
    if wanted.size and size != wanted.size:
        raise ImageError(f"{shown_url(wanted.url)} has {size} bytes instead of {wanted.size}")
    if size > SIZE_MAX_BYTES:
        raise ImageError(f"{shown_url(wanted.url)} has {size} bytes, more than any image")
    return size


def _validator(response: httpx2.Response) -> str:
    tag: str = response.headers.get("ETag", "")
    # a weak tag covers several contents, so it must not be used to resume
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


async def _receive(response: httpx2.Response, part: _Partial, progress: Callable[[int, int], object]) -> None:
    pending = bytearray()

    async def write() -> None:
        data = bytes(pending)
        pending.clear()
        await in_thread(partial(part.write, data))

    try:
        async for piece in response.aiter_raw():
            pending += piece
            done = part.size + len(pending)
            if done > part.note.size:
                pending.clear()
                part.clear()
                raise ImageError(f"{shown_url(part.wanted.url)} has more than the expected {part.note.size} bytes")
            if len(pending) >= _WRITE_BYTES:
                await write()
            progress(done, part.note.size)
    finally:
        if pending:
            await write()


def _certificate_problem(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return ""
