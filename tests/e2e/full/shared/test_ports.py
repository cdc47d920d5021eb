"""Ports of the host that lead into the guest: exported by the manager, published by containers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

import ovm
from full import BUSYBOX_IMAGE, Podman, eventually, fetch, running
from ovm.network.host_ports import free_port

pytestmark = pytest.mark.full


def any_port(protocol: str = "tcp") -> int:
    port = free_port(protocol, "127.0.0.1", 0)  # type: ignore[arg-type]
    assert port
    return port


SERVE = "echo hello > /tmp/hello; exec httpd -f -p 80 -h /tmp"


async def test_a_published_port_appears_on_loopback_alone(podman: Podman) -> None:
    """``-p`` opens the port on the host's loopback, and it is gone with the container."""
    port = any_port()
    async with running(podman, "-p", f"{port}:80", BUSYBOX_IMAGE, "sh", "-c", SERVE):

        async def served() -> bool:
            return await fetch(port) == "hello"

        await eventually(served)
        opened = [f for f in podman.machine.ports() if f.host_port == port]
        assert [(f.host_address, f.purpose, f.protocol) for f in opened] == [("127.0.0.1", "container", "tcp")]
    assert await fetch(port) == ""
    assert not [f for f in podman.machine.ports() if f.host_port == port]


async def test_a_published_port_binds_the_address_that_was_named(podman: Podman) -> None:
    """``-p ADDRESS:…`` binds that address and no other."""
    if not free_port("tcp", "127.0.0.9", 0):
        pytest.skip("this host has not the whole of 127/8; on a Mac: sudo ifconfig lo0 alias 127.0.0.9")
    port = any_port()
    async with running(podman, "-p", f"127.0.0.9:{port}:80", BUSYBOX_IMAGE, "sh", "-c", SERVE):

        async def served() -> bool:
            return await fetch(port, "127.0.0.9") == "hello"

        await eventually(served)
        assert await fetch(port) == ""


async def test_a_taken_port_fails_the_container_with_words(podman: Podman) -> None:
    """The user of podman reads why the port could not be published."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        ran = await podman("run", "--rm", "-p", f"{port}:80", BUSYBOX_IMAGE, "true", check=False)
    assert ran.status != 0
    assert "address already in use" in ran.err


@pytest.fixture
async def web(podman: Podman) -> AsyncIterator[str]:
    """A web server on the guest's own port 8088 (host network), which nobody announces."""
    serve = "echo hello > /tmp/hello; exec httpd -f -p 8088 -h /tmp"
    async with running(podman, "--network", "host", BUSYBOX_IMAGE, "sh", "-c", serve) as container:
        yield container


async def test_export_list_unexport(vm: ovm.OVM, web: str) -> None:
    """An exported port leads into the guest until it is unexported."""
    assert web
    forward = await vm.export_port(0, 8088)
    assert forward.host_address == "127.0.0.1"
    assert forward in vm.ports()
    assert await vm.export_port(forward.host_port, 8088) == forward

    async def served() -> bool:
        return await fetch(forward.host_port) == "hello"

    await eventually(served)
    await vm.unexport_port(forward.host_port)
    assert forward not in vm.ports()
    assert await fetch(forward.host_port) == ""
    with pytest.raises(ovm.PortError, match="not exported"):
        await vm.unexport_port(forward.host_port)


UDP_ECHO = """
socket(S, 2, 2, 17) && bind(S, pack("Sna4x8", 2, $ARGV[0], "\\0" x 4)) || die $!;
while (defined($from = recv(S, $words, 999, 0))) { send(S, $words, 0, $from) }
"""


async def test_udp_published_and_exported(podman: Podman) -> None:
    """A datagram goes in and its answer comes out, through a container's port and through an exported one."""
    port = any_port("udp")
    echo = ["-p", f"{port}:{port}/udp", BUSYBOX_IMAGE, "perl", "-e", UDP_ECHO, str(port)]
    async with running(podman, *echo):
        forward = await podman.machine.export_port(0, port, protocol="udp")
        assert forward.protocol == "udp"
        for host_port in (port, forward.host_port):

            async def echoed(host_port: int = host_port) -> bool:
                return await asyncio.to_thread(ask, host_port) == b"ping"

            await eventually(echoed)
        await podman.machine.unexport_port(forward.host_port, protocol="udp")


def ask(port: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        client.sendto(b"ping", ("127.0.0.1", port))
        try:
            return client.recv(100)
        except OSError:
            return b""


async def test_a_taken_host_port_is_refused(vm: ovm.OVM) -> None:
    """Exporting onto a port that somebody has says so, and opens nothing."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ovm.PortError, match="already in use"):
            await vm.export_port(port, 80)
    assert not [f for f in vm.ports() if f.host_port == port]
