"""Container ports: podman in the guest requests each ``-p``, and the manager decides whether to publish it.

In the guest, gateway.containers.internal is the guest itself, where a reverse forward sends podman's requests to the
manager. Every process in the guest's network can connect there. So the manager identifies the peer of each connection
before it reads a byte, and accepts requests only from podman. One command at a time identifies the peers of all waiting
connections. A flood of connections therefore costs no tasks and only one sshd session, and podman's own request waits
for at most two such commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Literal

import msgspec

from ovm.errors import OVMError
from ovm.guest.sparing import Sparing
from ovm.model.ports import Forward, Protocol
from ovm.text.printable import GuestText

if TYPE_CHECKING:
    import asyncssh

    from ovm.guest.ssh import SSH

log = logging.getLogger(__name__)

LISTEN_PORT = 80
PEER = "/usr/lib/ovm/peer"
RELEASE = "/usr/lib/ovm/release-port"
PEER_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 10.0
BODY_LIMIT_BYTES = 64 * 1024
READ_BYTES = 16 * 1024
WAITING_MAX = 2048
"""Connections whose peer is not yet identified; one more is closed at once."""
ASKED_MAX = 1024
"""Connections whose peers one command identifies."""
SERVED_MAX = 64
"""Requests of podman that are served concurrently."""


class _Request(msgspec.Struct):
    """A request of podman (libpod/networking_machine.go), in gvproxy's format."""

    local: str
    remote: str = ""
    protocol: Protocol | Literal[""] = ""


Decide = Callable[[Forward, bool], Awaitable[None]]
"""Opens (``True``) or closes a port; raises an OVMError to reject the request."""


class Refused(Exception):
    """A rejected request: the HTTP status and the text of the response, which podman shows to its user."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def parse(target: str, body: bytes) -> tuple[Forward, bool]:
    """Return the port in a request, and whether to open it. The address is empty if ``-p`` had none.

    Raises:
        Refused: it is not a valid request of podman.
    """
    actions = {"/services/forwarder/expose": True, "/services/forwarder/unexpose": False}
    if target not in actions:
        raise Refused(404, "not found")
    try:
        request = msgspec.json.decode(body, type=_Request)
        address, _, port = request.local.rpartition(":")
        number = int(port)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Refused(400, f"invalid request: {error}") from error
    if not 1 <= number <= 65535:
        raise Refused(400, f"{number} is not a port number")
    forward = Forward(
        protocol=request.protocol or "tcp",
        host_address=address.strip("[]"),
        host_port=number,
        guest_port=number,
        purpose="container",
    )
    return forward, actions[target]


@dataclass(frozen=True, slots=True)
class _Knock:
    """An unread connection to the manager's port in the guest."""

    reader: asyncssh.SSHReader[bytes]
    writer: asyncssh.SSHWriter[bytes]
    from_port: int


class Publisher:
    """Serves podman's port requests over the ssh connection."""

    def __init__(self, ssh: SSH, decide: Decide) -> None:
        self._ssh = ssh
        self._decide = decide
        self._waiting: dict[int, _Knock] = {}
        self._asking: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._warn = Sparing(log.warning, "refused port requests")
        ssh.on_connect(self._listen)

    async def _listen(self, ssh: SSH) -> None:
        await ssh.listen_in_guest(LISTEN_PORT, self._knocked, release=[RELEASE, str(LISTEN_PORT)])

    def _knocked(self, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes], from_port: int) -> None:
        if older := self._waiting.pop(from_port, None):  # its client closed it; otherwise the port would not be free
            older.writer.close()
        if len(self._waiting) >= WAITING_MAX:
            self._warn("port request refused: too many waiting connections")
            writer.close()
            return
        self._waiting[from_port] = _Knock(reader, writer, from_port)
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_until_none_waits(), name="peers of port announcements")

    async def _ask_until_none_waits(self) -> None:
        while self._waiting:
            asked = list(islice(self._waiting.values(), ASKED_MAX))
            try:
                told = await self._ssh.exec([PEER, *(str(k.from_port) for k in asked)], timeout_s=PEER_TIMEOUT_S)
                peers = told.stdout.splitlines() or [b""] * len(asked)
            except OVMError as error:
                self._warn(f"{len(asked)} port requests refused: {error.message}")
                for knock in asked:
                    self._refuse(knock, Refused(500, error.message))
                continue
            for knock, peer in zip(asked, peers, strict=False):  # an older image reports only the first peer
                if peer == b"podman":
                    await self._obey(knock)
                else:
                    who = GuestText(peer) if peer else "an unknown process"
                    refusal = Refused(403, f"only podman may publish ports, not {who}")
                    self._warn(f"port request refused: {refusal}")
                    self._refuse(knock, refusal)
                    await asyncio.sleep(0)  # let other tasks run between a thousand refusals

    def _is_over(self, knock: _Knock) -> bool:
        """Return whether a newer connection from its port replaced ``knock``; if not, stop its waiting."""
        if self._waiting.get(knock.from_port) is not knock:
            return True
        del self._waiting[knock.from_port]
        return False

    def _refuse(self, knock: _Knock, refusal: Refused) -> None:
        if not self._is_over(knock):
            with contextlib.closing(knock.writer), contextlib.suppress(OSError):
                knock.writer.write(_answer(refusal.status, str(refusal)))

    async def _obey(self, knock: _Knock) -> None:
        if self._is_over(knock):
            return
        if len(self._serving) >= SERVED_MAX:
            await asyncio.wait(self._serving, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._serve(knock.reader, knock.writer), name="port announcement")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
        import h11

        with contextlib.closing(writer), contextlib.suppress(OSError):
            status, words = 200, ""
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    target, body = await _read_request(reader)
                await self._decide(*parse(target, body))
            except Refused as refusal:
                status, words = refusal.status, str(refusal)
            except OVMError as error:
                status, words = 500, error.message
            except h11.RemoteProtocolError as error:
                status, words = 400, str(error)
            if status != 200:
                self._warn(f"port request refused: {GuestText(words)}")
            writer.write(_answer(status, words))
            await writer.drain()


def _answer(status: int, words: str) -> bytes:
    content = words.encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def _read_request(reader: asyncssh.SSHReader[bytes]) -> tuple[str, bytes]:
    import h11

    connection = h11.Connection(h11.SERVER)
    target, body = "", b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Request):
            if event.method != b"POST":
                raise Refused(405, "only POST is supported")
            target = event.target.decode("ascii", errors="replace")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_LIMIT_BYTES:
                raise Refused(413, "the body is too large")
        elif isinstance(event, h11.EndOfMessage):
            return target, body
        else:
            raise Refused(400, "the connection closed early")
