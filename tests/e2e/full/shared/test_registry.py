"""Images from and to a registry on the host, whose certificate only a CA of the tests' own has signed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

import under
from full import Authority, Podman

pytestmark = pytest.mark.full


@pytest.fixture
async def registry(authority: Authority, tmp_path: Path) -> AsyncIterator[str]:
    """A registry behind TLS on the host's loopback; yields its name as the guest sees it."""
    program = under.program("docker-registry", "registry")  # Debian's name, and its authors'
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {tmp_path / 'store'}}}}}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n  tls:\n    certificate: {authority.certificate}\n    key: {authority.key}\n"
    )
    log_path = tmp_path / "registry.log"
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(program, "serve", str(config), stdout=log, stderr=log)
    try:
        async with asyncio.timeout(30):
            while True:
                assert process.returncode is None, log_path.read_text()
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    break
        yield f"host.containers.internal:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_push_and_pull(podman: Podman, registry: str) -> None:
    """An image pushed to a registry can be pulled again, TLS verified."""
    remote = f"{registry}/busybox:pushed"
    # over HTTP: podman 4's client does not understand the stream that podman 5 answers a push with
    transport = httpx2.AsyncHTTPTransport(uds=str(podman.machine.info.podman_socket))
    async with httpx2.AsyncClient(transport=transport, timeout=60) as client:
        url = "http://d/v5.0.0/libpod/images/localhost%2Fbusybox:latest/push"
        pushed = await client.post(url, params={"destination": remote, "tlsVerify": "true", "quiet": "true"})
    assert pushed.status_code == 200, pushed.text
    assert "error" not in pushed.text, pushed.text
    await podman("pull", remote)
    try:
        assert (await podman("run", "--rm", remote, "echo", "pulled")).out == "pulled"
    finally:
        await podman("rmi", remote)
