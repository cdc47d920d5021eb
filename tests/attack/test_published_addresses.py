"""What people's own clients send for ``-p`` (B26): where the manager then binds it is session.publish's to decide."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import under

TIMEOUT_S = 60
HEAD_LIMIT_BYTES = 64 << 10
PULLED = b'{"images": ["0"], "id": "0"}'


class Engine:
    """Answers a client until it wants a container, of which it keeps what was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, object] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                target, body = head.split()[1], await _body(reader, head.lower())
                status, answer = "200 OK", PULLED if "/images/pull" in target else b"{}"
                if "/containers/create" in target:
                    self.asked = json.loads(body)
                    status = "500 Internal Server Error"
                    answer = b'{"message": "seen"}'
                writer.write(
                    f"HTTP/1.1 {status}\r\nApi-Version: 1.41\r\nLibpod-API-Version: 5.4.2\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n".encode()
                    + answer
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @property
    def address(self) -> str:
        """Of the one published port."""
        if mappings := self.asked.get("portmappings"):  # podman's own words
            assert isinstance(mappings, list)
            return str(mappings[0].get("host_ip", ""))
        config = self.asked["HostConfig"]
        assert isinstance(config, dict)
        return str(config["PortBindings"]["80/tcp"][0]["HostIp"])


async def _body(reader: asyncio.StreamReader, head: str) -> bytes:
    if "transfer-encoding: chunked" in head:
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return body
    length = head.partition("content-length:")[2].split()
    return await reader.readexactly(int(length[0])) if length else b""


@pytest.fixture
async def engine(short_path: Path) -> AsyncIterator[Engine]:
    """An engine at short_path/sock."""
    made = Engine()
    async with await asyncio.start_unix_server(made.serve, short_path / "sock", limit=HEAD_LIMIT_BYTES):
        yield made


@pytest.mark.parametrize(
    ("named", "podmans", "dockers"),
    [
        ("", "", ""),
        ("0.0.0.0:", "", "0.0.0.0"),
        ("[::]:", "::", "::"),
        ("127.0.0.1:", "127.0.0.1", "127.0.0.1"),
        ("192.0.2.1:", "192.0.2.1", "192.0.2.1"),
    ],
)
@pytest.mark.parametrize("client", ["podman", "docker"])
async def test_the_address_that_a_client_sends(
    engine: Engine, short_path: Path, client: str, named: str, podmans: str, dockers: str
) -> None:
    """B26: no client names an address that its user did not. podman's own client leaves 0.0.0.0 out."""
    host = f"unix://{short_path / 'sock'}"
    argv = {"podman": ["podman", "--remote", "--url", host], "docker": ["docker", "-H", host]}[client]
    process = await asyncio.create_subprocess_exec(
        under.program(client),
        *argv[1:],
        *("create", "-p", f"{named}8080:80", "localhost/image", "sh"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(short_path)},
    )
    async with asyncio.timeout(TIMEOUT_S):
        said, _ = await process.communicate()
    assert engine.asked, said
    assert engine.address == (podmans if client == "podman" else dockers)
