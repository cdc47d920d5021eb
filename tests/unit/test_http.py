"""HTTP over a unix socket, against a server that answers what it is told to."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest

from ovm.wire import http
from ovm.wire.error import WireError


class Thing(msgspec.Struct):
    name: str
    size: int = 0


@contextlib.asynccontextmanager
async def serving(path, answer: bytes, *, then: asyncio.Event | None = None):
    """A server that sends ``answer`` to every request, then hangs up, after ``then`` if given; yields what it got."""
    heard: list[bytes] = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(h[16:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length: ")), 0)
        heard.append(head + await reader.readexactly(length))
        with contextlib.suppress(ConnectionError):
            writer.write(answer)
            await writer.drain()
            if then is not None:
                await then.wait()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        async with http.connect(path) as client:
            yield client, heard
    finally:
        if then is not None:
            then.set()
        server.close()
        await server.wait_closed()


def response(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


async def test_an_answer_is_decoded_as_what_was_asked_for(short_path):
    """GET returns the answer as the type that was asked for."""
    async with serving(short_path / "s", response(b'{"name": "x", "size": 3, "more": 1}')) as (client, heard):
        assert await client.get("/thing", Thing) == Thing("x", 3)
    assert heard[0].startswith(b"GET /thing HTTP/1.1\r\n")


async def test_text_is_text(short_path):
    """An answer can be had as text, odd bytes and all."""
    async with serving(short_path / "s", response(b"OK\xff")) as (client, _):
        assert await client.text("/_ping") == "OK\ufffd"


async def test_post_sends_json(short_path):
    """POST sends its body as JSON and returns the answer's bytes."""
    async with serving(short_path / "s", response(b"done")) as (client, heard):
        assert await client.post("/do", {"local": ":80", "ü": [1]}) == b"done"
    assert heard[0].endswith('\r\n\r\n{"local":":80","ü":[1]}'.encode())


async def test_a_refusal_is_told_in_the_servers_words(short_path):
    """An answer without success is an error with its status and the server's own words."""
    async with serving(short_path / "s", response(b"proxy already running\n", "500 No")) as (client, _):
        with pytest.raises(WireError) as caught:
            await client.post("/expose", {})
    assert (caught.value.status, caught.value.message) == (500, "proxy already running")


async def test_a_refusal_without_words_says_its_status(short_path):
    """An empty answer without success still says what was asked and the status."""
    async with serving(short_path / "s", response(b"", "404 Not Found")) as (client, _):
        with pytest.raises(WireError, match="GET /x: status 404"):
            await client.text("/x")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"size": 3}', b'{"name": 5}', b'{"name": "\xff"}'])
async def test_an_answer_of_another_shape_is_an_error(short_path, body):
    """What is not JSON, or not of the asked shape, is a WireError and nothing else."""
    async with serving(short_path / "s", response(body)) as (client, _):
        with pytest.raises(WireError, match="GET /x: unexpected response"):
            await client.get("/x", Thing)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"])
async def test_what_is_no_whole_answer_is_an_error(short_path, answer):
    """A server that hangs up, speaks something else or stops half way is a WireError without a status."""
    async with serving(short_path / "s", answer) as (client, _):
        with pytest.raises(WireError, match="POST /x: ") as caught:
            await client.post("/x", {})
    assert caught.value.status == 0


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"])
async def test_a_silent_server_is_given_up(short_path, begun):
    """A server that does not answer, or not to the end, is given up at the deadline."""
    async with serving(short_path / "s", begun, then=asyncio.Event()) as (client, _):
        with pytest.raises(WireError, match=r"GET /x: no response within 0\.02 s"):
            await client.text("/x", timeout_s=0.02)


async def test_the_deadline_is_for_the_whole_answer(short_path):
    """A server that drips its answer byte by byte cannot stretch the deadline."""

    async def drip(reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while not reader.at_eof():
                writer.write(b"x")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await reader.read(4096)
        writer.close()

    server = await asyncio.start_unix_server(drip, short_path / "s")
    try:
        async with asyncio.timeout(5), http.connect(short_path / "s") as client:
            with pytest.raises(WireError, match="no response within"):
                await client.text("/x", timeout_s=0.05)
    finally:
        server.close()


@pytest.mark.parametrize("kind", ["missing", "stale"])
async def test_nobody_there_is_an_error_at_once(short_path, kind):
    """A socket that is not there, or on which nobody listens, is a WireError."""
    if kind == "stale":
        server = await asyncio.start_unix_server(lambda _r, w: w.close(), short_path / "s")
        (short_path / "s").rename(short_path / "kept")
        server.close()
        await server.wait_closed()
        (short_path / "kept").rename(short_path / "s")
    async with http.connect(short_path / "s") as client:
        with pytest.raises(WireError, match="GET /x: "):
            await client.text("/x")


async def test_proxies_of_the_user_play_no_part(short_path, monkeypatch):
    """A proxy in the environment is not asked to reach a local socket."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with serving(short_path / "s", response(b"OK")) as (client, _):
        assert await client.text("/") == "OK"
