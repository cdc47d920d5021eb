"""Container ports: podman in the guest announces each ``-p``, and the manager alone decides what happens.

In the guest, gateway.containers.internal is the guest itself, where a reverse forward hands podman's request to us.
Anybody in the guest who shares its network could knock there, so the guest is asked who is at the other end, and
only podman itself is obeyed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

from ovm.errors import OVMError
from ovm.text import printable

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


class _Request(msgspec.Struct):
    """podman's words (libpod/networking_machine.go); they are gvproxy's too."""

    local: str
    remote: str = ""
    protocol: Literal["tcp", "udp", ""] = ""


@dataclass(frozen=True, slots=True)
class Published:
    """A port that podman wants opened or closed on the host."""

    protocol: Literal["tcp", "udp"]
    address: str
    """Empty where ``-p`` named none."""
    port: int


Decide = Callable[[Published, bool], Awaitable[None]]
"""Opens (``True``) or closes a port; raises an OVMError to refuse."""


class Refused(Exception):
    """A request is answered with ``status`` and words; podman shows them to its user."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def parse(target: str, body: bytes) -> tuple[Published, bool]:
    """What a request wants: the port, and whether it is to be opened.

    Raises:
        Refused: it is no request of podman's.
    """
    actions = {"/services/forwarder/expose": True, "/services/forwarder/unexpose": False}
    if target not in actions:
        raise Refused(404, "not found")
    try:
        request = msgspec.json.decode(body, type=_Request)
        address, _, port = request.local.rpartition(":")
        number = int(port)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Refused(400, f"not understood: {error}") from error
    if not 1 <= number <= 65535:
        raise Refused(400, f"{number} is no port")
    return Published(request.protocol or "tcp", address.strip("[]"), number), actions[target]


class Publisher:
    """Serves podman's announcements over the ssh connection."""

    def __init__(self, ssh: SSH, decide: Decide) -> None:
        self._ssh = ssh
        self._decide = decide
        ssh.on_connect(self._listen)

    async def _listen(self, ssh: SSH) -> None:
        await ssh.listen_in_guest(LISTEN_PORT, self._serve, release=[RELEASE, str(LISTEN_PORT)])

    async def _serve(
        self, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes], from_port: int
    ) -> None:
        import h11

        connection = h11.Connection(h11.SERVER)
        with contextlib.closing(writer), contextlib.suppress(OSError):
            try:
                status, words = 200, ""
                async with asyncio.timeout(READ_TIMEOUT_S):
                    target, body = await _read_request(connection, reader)
                wanted = parse(target, body)
                await self._check_peer(from_port)
                await self._decide(*wanted)
            except Refused as refusal:
                status, words = refusal.status, str(refusal)
            except OVMError as error:
                status, words = 500, error.message
            except h11.RemoteProtocolError as error:
                status, words = 400, str(error)
            if status != 200:
                log.warning("port announcement refused: %s", printable(words))
            if connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                content = words.encode()
                headers = [("content-length", str(len(content))), ("connection", "close")]
                answer = [h11.Response(status_code=status, headers=headers), h11.Data(data=content), h11.EndOfMessage()]
                for event in answer:
                    writer.write(connection.send(event) or b"")
                await writer.drain()

    async def _check_peer(self, from_port: int) -> None:
        answer = await self._ssh.exec([PEER, str(from_port)], timeout_s=PEER_TIMEOUT_S)
        if answer.exit_status != 0:
            raise Refused(403, f"only podman may order ports, this was {answer.text or 'somebody unknown'}")


async def _read_request(connection: object, reader: asyncssh.SSHReader[bytes]) -> tuple[str, bytes]:
    import h11

    assert isinstance(connection, h11.Connection)
    target, body = "", b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Request):
            if event.method != b"POST":
                raise Refused(405, "post only")
            target = event.target.decode("ascii", errors="replace")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_LIMIT_BYTES:
                raise Refused(413, "too much")
        elif isinstance(event, h11.EndOfMessage):
            return target, body
        else:
            raise Refused(400, "hung up")
