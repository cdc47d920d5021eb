"""One large file from a web server: resumed where it was cut, no larger than announced, its digest taken on the way."""

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
"""For each piece of an answer; a download as a whole may take as long as it goes on."""
ATTEMPTS = 5
"""In a row that bring nothing new."""
BACKOFF_S = 1.0
"""After the first of them; twice as long after each further one."""
REDIRECTS_MAX = 10
SIZE_MAX_BYTES = 4 * 1024**3

PARTIAL = "download"
"""The part that has arrived; the next download of the same file resumes there."""
NOTE = "download.json"

NOTE_MAX_BYTES = 64 * 1024
_WRITE_BYTES = 1024 * 1024
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TRY_AGAIN = frozenset({408, 425, 429})
"""And whatever a server blames on itself."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)")
_CONTENT_LENGTH = re.compile("[0-9]{1,19}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The file to fetch, and what is known of it."""

    url: str
    sha256: str = ""
    size: int = 0
    """In bytes; 0 where only the server knows."""


def url_complaint(url: str, *, has_digest: bool) -> str:
    """Why nothing is fetched from ``url``; empty if it may be used."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:  # whose message quotes parts of the URL, a password for one
        return "it is no http or https URL"
    if parts.scheme not in {"http", "https"} or not host:
        return "it is no http or https URL"
    if parts.scheme == "http" and not has_digest and host not in _LOOPBACK:
        return "a download over plain http can be replaced on its way"
    return ""


def discard(directory: Path) -> None:
    """Forget what has come so far."""
    for name in (PARTIAL, NOTE):
        (directory / name).unlink(missing_ok=True)


async def download(
    wanted: Wanted, directory: Path, *, room: int = 0, progress: Callable[[int, int], object] | None = None
) -> Path:
    """Fetch a file into ``directory``, which nobody else uses meanwhile.

    If it fails or is cancelled, what has come stays as ``download`` for the next time.

    Args:
        wanted: The file.
        directory: Where it goes.
        room: Bytes that must remain free beside it.
        progress: Called in the event loop with the bytes done and the bytes in all.

    Raises:
        ImageError: it cannot be had; or it is not what was wanted, and then nothing of it stays.
        SpaceError: the file system has too little room.
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
                hint="it is damaged, or another file than the one that was meant",
            )
    return part.path


class _DroppedError(Exception):
    """The attempt brought less than all, and another one may bring more."""


class _Note(msgspec.Struct, frozen=True):
    """What the partial file is a part of."""

    key: str = ""
    size: Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX_BYTES)] = 0
    validator: Annotated[str, msgspec.Meta(pattern=r"\A[ -~]{0,1000}\Z")] = ""
    """The server's word for this very content, for If-Range."""


class _Partial:
    """What has come of a file, and the digest of it so far."""

    def __init__(self, directory: Path, wanted: Wanted) -> None:
        self.wanted = wanted
        self.path = directory / PARTIAL
        self._note_path = directory / NOTE
        # a digest stands for the content wherever it comes from; the URL is kept as one too, it may hold a secret
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
        """Go on from what an earlier run left."""
        while (data := self._file.read(_WRITE_BYTES)) and not stop.is_set():
            self._digest.update(data)
            self.size += len(data)
        if self.size > self.note.size:
            self.clear()

    def begin(self, size: int, validator: str) -> None:
        """Start anew with what the server has now."""
        self.clear()
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
            # they are trusted because nobody is in between: no proxy either
            mounts={f"all://[{host}]" if ":" in host else f"all://{host}": None for host in _LOOPBACK},
        )
    except (OSError, ValueError, ImportError, httpx2.InvalidURL) as error:
        raise ImageError(
            f"the proxy or the certificates that the environment names cannot be used: {_without_proxies(error)}",
            hint="look at http_proxy, https_proxy, all_proxy, SSL_CERT_FILE and SSL_CERT_DIR",
        ) from error


def _without_proxies(error: Exception) -> str:
    """What ``error`` says, without the credentials of the proxies in the environment."""
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
            if (
                part.size > furthest
            ):  # not merely than before, because a server that cannot resume starts over each time
                furthest, failures = part.size, 0
            failures += 1
            if failures == ATTEMPTS:
                raise ImageError(
                    f"{shown_url(part.wanted.url)} cannot be fetched: {error}",
                    hint="pull again: what has come is kept" if part.size else "check the URL and the network",
                ) from error
            await asyncio.sleep(BACKOFF_S * 2 ** (failures - 1))
        else:
            return


async def _fetch(client: httpx2.AsyncClient, part: _Partial, room: int, progress: Callable[[int, int], object]) -> None:
    """One attempt, from where the last one ended."""
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
        raise ImageError(f"{shown_url(part.wanted.url)} is no URL") from error  # the error quotes it
    except httpx2.RequestError as error:
        if certificate := _certificate_problem(error):
            raise ImageError(
                f"{shown_url(part.wanted.url)}: the server's certificate is not trusted: {certificate}",
                hint="if a proxy of yours opens TLS, SSL_CERT_FILE names the file with its certificate authority",
            ) from error
        raise _DroppedError(_without_proxies(error) or type(error).__name__) from error
    if not part.is_whole:
        raise _DroppedError(f"it ended after {part.size} of {part.note.size} bytes")


@contextlib.asynccontextmanager
async def _answer(client: httpx2.AsyncClient, part: _Partial) -> AsyncIterator[httpx2.Response]:
    """The answer behind all redirects. Their bodies are not read, and each hop must be as safe as the first."""
    request = client.build_request("GET", part.wanted.url, headers=_conditions(part))
    for _ in range(REDIRECTS_MAX + 1):
        response = await client.send(request, stream=True)
        async with contextlib.aclosing(response):
            if not response.has_redirect_location:
                yield response
                return
        if response.next_request is None:
            raise ImageError(f"{shown_url(part.wanted.url)} redirects to what is no URL")
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
    """Make the partial file fit the answer whose body is about to come."""
    status = response.status_code
    if status == HTTPStatus.PARTIAL_CONTENT:
        told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if told is None or int(told[1]) != part.size or told[2] not in {str(part.note.size), "*"}:
            part.clear()
            raise _DroppedError("the server resumes elsewhere than it was asked to")
        return
    if status != HTTPStatus.OK:
        answer = f"the server answers {status} {response.reason_phrase}".rstrip()
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
        raise ImageError(f"{shown_url(wanted.url)}: the server does not say how large it is", hint="use another server")
    if wanted.size and size != wanted.size:
        raise ImageError(f"{shown_url(wanted.url)} has {size} bytes instead of {wanted.size}")
    if size > SIZE_MAX_BYTES:
        raise ImageError(f"{shown_url(wanted.url)} has {size} bytes, which no image has")
    return size


def _validator(response: httpx2.Response) -> str:
    tag: str = response.headers.get("ETag", "")
    # a weak tag stands for several contents, and may not be used to resume
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
                raise ImageError(
                    f"{shown_url(part.wanted.url)} has more than the {part.note.size} bytes it should have"
                )
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
