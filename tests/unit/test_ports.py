"""podman's announcements: understood, obeyed if they are podman's, refused in words."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from networks import published
from ovm.errors import PortError
from ovm.guest import port_publisher
from ovm.guest.port_publisher import PEER, Publisher, Refused, parse
from ovm.model.ports import Forward

EXPOSE, UNEXPOSE = "/services/forwarder/expose", "/services/forwarder/unexpose"


@pytest.mark.parametrize(
    ("target", "body", "wanted"),
    [
        (EXPOSE, {"local": ":8080", "remote": "192.168.127.2:8080", "protocol": "tcp"}, ("tcp", "", 8080, True)),
        (EXPOSE, {"local": "0.0.0.0:80", "protocol": "tcp"}, ("tcp", "0.0.0.0", 80, True)),
        (EXPOSE, {"local": "127.0.0.1:53", "protocol": "udp"}, ("udp", "127.0.0.1", 53, True)),
        (EXPOSE, {"local": "[::1]:53"}, ("tcp", "::1", 53, True)),
        (EXPOSE, {"local": ":53", "protocol": ""}, ("tcp", "", 53, True)),
        (EXPOSE, {"local": ":53", "more": [1]}, ("tcp", "", 53, True)),
        (UNEXPOSE, {"local": ":65535", "protocol": "tcp"}, ("tcp", "", 65535, False)),
    ],
)
def test_what_podman_says_is_understood(target, body, wanted):
    """Each form podman uses names the protocol, the address if one was asked for, and the port."""
    assert parse(target, json.dumps(body).encode()) == (published(*wanted[:3]), wanted[3])


@pytest.mark.parametrize(
    ("target", "body", "status"),
    [
        ("/", b'{"local": ":80"}', 404),
        ("/services/forwarder/all", b"", 404),
        (EXPOSE + "?x", b'{"local": ":80"}', 404),
        (EXPOSE, b"", 400),
        (EXPOSE, b"{", 400),
        (EXPOSE, b"[]", 400),
        (EXPOSE, b"{}", 400),
        (EXPOSE, b'{"local": 80}', 400),
        (EXPOSE, b'{"local": "\xff:80"}', 400),
        (EXPOSE, b'{"local": "80"}', None),
        (EXPOSE, b'{"local": ":"}', 400),
        (EXPOSE, b'{"local": ":0"}', 400),
        (EXPOSE, b'{"local": ":65536"}', 400),
        (EXPOSE, b'{"local": ":-1"}', 400),
        (EXPOSE, b'{"local": ":http"}', 400),
        (EXPOSE, b'{"local": ":80", "protocol": "unix"}', 400),
        (EXPOSE, b'{"local": ":80", "protocol": "sctp"}', 400),
    ],
)
def test_anything_else_is_refused(target, body, status):
    """What is no request of podman's is refused with a status, above all a unix socket of the host."""
    if status is None:
        assert parse(target, body)[0] == published("tcp", "", 80)
        return
    with pytest.raises(Refused) as caught:
        parse(target, body)
    assert caught.value.status == status


class Guest:
    """A guest in which podman, or somebody else, knocks."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.decided: list[tuple[Forward, bool]] = []
        self.refusal: Exception | None = None
        self.peer = "podman"
        self.asked: list[str] = []

    async def decide(self, wanted: Forward, opened: bool) -> None:
        self.decided.append((wanted, opened))
        if self.refusal:
            raise self.refusal

    async def check_peer(self, process) -> None:
        self.asked.append(process.command)
        process.stdout.write(self.peer.encode() + b"\n")
        process.exit(0 if self.peer == "podman" else 1)

    async def say(self, request: bytes) -> tuple[int, str]:
        """Status and words of the answer; (0, "") if there was none."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.came_from = writer.get_extra_info("sockname")[1]
        try:
            async with asyncio.timeout(5):
                writer.write(request)
                answer = await reader.read()
        except ConnectionError:
            answer = b""
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        head, _, words = answer.decode().partition("\r\n\r\n")
        return int(head.split()[1]) if head else 0, words

    async def post(self, target: str, body: object) -> tuple[int, str]:
        content = json.dumps(body).encode()
        head = f"POST {target} HTTP/1.1\r\nHost: gateway.containers.internal\r\nContent-Length: {len(content)}\r\n\r\n"
        return await self.say(head.encode() + content)


@pytest.fixture
async def guest(sshd, ssh, unused_port, monkeypatch):
    """A guest whose announcements are served."""
    monkeypatch.setattr(port_publisher, "LISTEN_PORT", unused_port)
    guest = Guest(unused_port)
    sshd.serve = guest.check_peer
    Publisher(ssh, guest.decide)
    await ssh.connect()
    return guest


async def test_podman_is_obeyed(guest):
    """podman's request is carried out and answered with 200, after the guest was asked who is at the other end."""
    assert await guest.post(EXPOSE, {"local": ":8080", "protocol": "tcp"}) == (200, "")
    assert guest.asked == [f"{PEER} {guest.came_from}"]
    assert await guest.post(UNEXPOSE, {"local": ":8080", "protocol": "tcp"}) == (200, "")
    assert guest.decided == [(published("tcp", "", 8080), True), (published("tcp", "", 8080), False)]


async def test_nobody_else_is_obeyed(guest):
    """Whoever is not podman gets 403 and opens nothing."""
    guest.peer = "curl"
    status, words = await guest.post(EXPOSE, {"local": ":8080"})
    assert status == 403
    assert "only podman may publish ports, not curl" in words
    assert guest.decided == []


async def test_a_port_that_is_taken_is_told_in_words(guest):
    """A port that cannot be opened is answered with 500 and why, which podman shows to its user."""
    guest.refusal = PortError("tcp port 127.0.0.1:8080: address already in use")
    assert await guest.post(EXPOSE, {"local": ":8080"}) == (500, "tcp port 127.0.0.1:8080: address already in use")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /services/forwarder/all HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"rubbish\r\n\r\n", 400),
        (b"POST /services/forwarder/expose HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70000, 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000, 400),
    ],
)
async def test_what_is_no_request_of_podmans_is_refused(guest, request_, status):
    """Other methods, rubbish and too much of it are refused with a status and reach nobody."""
    assert (await guest.say(request_))[0] == status
    assert guest.decided == []


async def test_after_rubbish_podman_is_still_served(guest, monkeypatch):
    """Whoever hangs up half way, or says nothing at all, does not keep podman from being served."""
    monkeypatch.setattr(port_publisher, "READ_TIMEOUT_S", 0.02)
    reader, writer = await asyncio.open_connection("127.0.0.1", guest.port)
    writer.write(b"POST / HT")
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    monkeypatch.setattr(port_publisher, "READ_TIMEOUT_S", 5.0)
    assert await guest.post(EXPOSE, {"local": ":8080"}) == (200, "")


async def test_announcements_are_served_again_after_a_lost_connection(sshd, ssh, guest):
    """After a reconnect podman's announcements are served as before."""
    sshd.connections[0].abort()
    await sshd.connections[0].wait_closed()
    async with asyncio.timeout(5):
        while len(sshd.connections) < 2:
            await ssh.connect()
            await asyncio.sleep(0)
    assert await guest.post(EXPOSE, {"local": ":1"}) == (200, "")
