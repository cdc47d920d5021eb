"""Row B28: what the REST interface makes of odd numbers, addresses, clients that hang up, and too many of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from pathlib import Path

import msgspec
import pytest

import puppets
from ovm.errors import OptionError
from ovm.model.validation import SECONDS_MAX, check_address, check_seconds
from ovm.registry.settings import port
from ovm.service import app, connection
from ovm.service import protocol as p

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a puppet's service is looked at in /proc")

HEAD = b"%s %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s"


def ask(path: Path, method: bytes, what: bytes, body: bytes = b"", *, length: int | None = None) -> socket.socket:
    """Send a request, whose answer is for who wants it."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(str(path))
    with contextlib.suppress(BrokenPipeError):  # it may be refused before it is whole
        client.sendall(HEAD % (method, what, len(body) if length is None else length, body))
    return client


def status(path: Path, method: bytes, what: bytes, body: bytes = b"") -> int:
    with ask(path, method, what, body) as client:
        return int(client.recv(1000).split()[1])


@pytest.mark.parametrize("seconds", ["-1", "-0.001", "NaN", "Infinity", "1e999", "1e300", str(SECONDS_MAX + 1), '"1"'])
@pytest.mark.parametrize("kind", [p.Stop, p.Suspend, p.Exec])
def test_odd_timeouts_are_refused(kind: type[msgspec.Struct], seconds: str) -> None:
    """Negative ones, and those that are no numbers or too large."""
    body = f'{{"argv": ["true"], "timeout_s": {seconds}}}' if kind is p.Exec else f'{{"timeout_s": {seconds}}}'
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(body, type=kind)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e300, True, "1"])
def test_odd_timeouts_are_refused_by_the_command_too(seconds: float) -> None:
    """The command refuses odd timeouts too."""
    with pytest.raises(OptionError):
        check_seconds("timeout_s", seconds)


async def test_what_is_odd_is_a_400(stage: puppets.Stage) -> None:
    """And neither stops the machine nor is a fault of the service's."""
    await stage.up()
    path = stage.machine.service_socket
    odd = [
        (b"POST", b"/v1/stop", b'{"timeout_s": -1}'),
        (b"POST", b"/v1/stop", b'{"timeout_s": 1e999}'),
        (b"POST", b"/v1/stop", b'{"timeout_s": NaN}'),
        (b"POST", b"/v1/stop", b'{"force": "yes"}'),
        (b"POST", b"/v1/suspend", b'{"timeout_s": -1}'),
        (b"POST", b"/v1/exec", b'{"argv": ["true"], "timeout_s": -1}'),
        (b"POST", b"/v1/ports/add", b'{"guest_port": 0}'),
        (b"POST", b"/v1/ports/add", b'{"guest_port": 80, "host_port": 65536}'),
        (b"POST", b"/v1/ports/remove", b'{"host_port": -1}'),
        (b"GET", b"/v1/events?after=-1", b""),
        (b"GET", b"/v1/events?follow=1", b""),
        (b"GET", b"/v1/log?lines=1e3", b""),
        (b"GET", b"/v1/log?follow=", b""),
        (b"POST", b"/v1/prune", b'{"everything": 1}'),
        (b"POST", b"/v1/stop", b" " * (app.BODY_MAX_BYTES + 1)),
    ]
    for method, what, body in odd:
        assert await asyncio.to_thread(status, path, method, what, body) == 400, (what, body[:40])
    assert await asyncio.to_thread(status, path, b"GET", b"/v1/status") == 200
    assert "Traceback" not in stage.log()


@pytest.mark.parametrize(
    ("given", "one"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("::0001", "::1"),
        ("0::1", "::1"),
        ("::FFFF:127.0.0.1", "127.0.0.1"),
        ("::ffff:7f00:1", "127.0.0.1"),
        ("FE80::A", "fe80::a"),
        ("0:0::0", "::"),
    ],
)
def test_addresses_have_one_spelling(given: str, one: str) -> None:
    """Else a port could be opened at one and not be found at the other."""
    assert check_address("address", given) == one
    assert port(f"[{given}]:80:80" if ":" in given else f"{given}:80:80").address == one


@pytest.mark.parametrize(
    "given", ["127.1", "[::1]", "2130706433", "0x7f.1", "127.0.0.01", " 127.0.0.1", "localhost", ""]
)
def test_what_only_some_take_for_an_address_is_refused(given: str) -> None:
    """A C library reads 127.1 as 127.0.0.1, gvproxy does not."""
    with pytest.raises(OptionError):
        check_address("address", given)


async def test_clients_that_hang_up_are_no_flaws(stage: puppets.Stage) -> None:
    """None leaves a traceback, nor anything that runs."""
    await stage.up()
    path = stage.machine.service_socket
    (stage.machine.log_dir / "console.log").write_text("x\n")
    stage.order("hold-answer")
    for what in (b"/v1/state", b"/v1/events", b"/v1/log?follow=true", b"/v1/status"):
        (await asyncio.to_thread(ask, path, b"GET", what)).close()
        with await asyncio.to_thread(ask, path, b"GET", what) as client:
            client.shutdown(socket.SHUT_WR)
    (await asyncio.to_thread(ask, path, b"POST", b"/v1/exec", b'{"argv": ["x"]}')).close()
    with await asyncio.to_thread(ask, path, b"POST", b"/v1/exec", b'{"argv": ["x"]}') as client:
        await asyncio.to_thread(client.recv, 10)  # its head
    for body in (b"", b'{"force'):
        (await asyncio.to_thread(ask, path, b"POST", b"/v1/stop", body, length=100)).close()
    stage.revoke("hold-answer")
    assert await asyncio.to_thread(status, path, b"GET", b"/v1/status") == 200
    assert (await stage.run("stop", "dev")).status == 0
    assert "Traceback" not in stage.log()
    assert "ERROR" not in stage.log()


async def test_too_many_clients_at_once(stage: puppets.Stage) -> None:
    """They are refused, and the machine can be looked at and stopped all the time."""
    await stage.up()
    path = stage.machine.service_socket
    held: list[socket.socket] = []
    with contextlib.ExitStack() as closing:
        for _ in range(app.STREAMS_MAX):
            held.append(closing.enter_context(await asyncio.to_thread(ask, path, b"GET", b"/v1/events")))
            await asyncio.to_thread(held[-1].recv, 10)
        with await asyncio.to_thread(ask, path, b"GET", b"/v1/events") as refused:
            told = ""
            while "}}" not in told:
                told += (await asyncio.to_thread(refused.recv, 5000)).decode()
        assert told.startswith("HTTP/1.1 503 ")
        assert json.loads(told.partition("\r\n\r\n")[2])["error"]["code"] == "in-use"
        assert (await stage.run("status", "dev")).status == 0
    with contextlib.ExitStack() as closing:
        for _ in range(3 * connection.CONNECTIONS_MAX):
            idle = closing.enter_context(socket.socket(socket.AF_UNIX))
            idle.settimeout(20)
            await asyncio.to_thread(idle.connect, str(path))
        assert (await asyncio.to_thread(idle.recv, 1)) == b"", "one too many is closed"
    assert (await stage.run("status", "dev")).status == 0
    assert (await stage.run("stop", "dev")).status == 0
    assert "Traceback" not in stage.log()


async def test_slow_senders_have_a_deadline(stage: puppets.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head and of a body, however many pieces they send."""
    monkeypatch.setenv("OVM_PUPPET_IMPATIENT", "0.3")
    stage.environment["OVM_PUPPET_IMPATIENT"] = "0.3"
    await stage.up()
    path = stage.machine.service_socket
    with await asyncio.to_thread(ask, path, b"POST", b"/v1/stop", b"{", length=100) as half:
        assert b" 400 " in await asyncio.to_thread(half.recv, 1000)
    with socket.socket(socket.AF_UNIX) as half:
        half.settimeout(20)
        half.connect(str(path))
        half.sendall(b"GET /v1/sta")
        assert await asyncio.to_thread(half.recv, 1000) == b""
    assert stage.is_held()
