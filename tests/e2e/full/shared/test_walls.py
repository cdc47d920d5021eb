"""What containers must not reach, tried from inside each kind of them, with ways that must work beside it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

import ovm
from full import BUSYBOX_IMAGE, Podman

pytestmark = pytest.mark.full

KINDS = {
    "bridged": [],
    "host network": ["--network", "host"],
    "privileged": ["--privileged"],
    "privileged on the host network": ["--privileged", "--network", "host"],
    "with podman's socket": ["-v", "/run/podman/podman.sock:/run/podman/podman.sock"],
}
OPEN = "open"
ANSWERS = (OPEN, "SSH-2.0", "200 OK")
Attempts = dict[str, tuple[int, str]]
EXPOSE = "/services/forwarder/expose"


@contextlib.asynccontextmanager
async def host_service() -> AsyncIterator[int]:
    """Something on the host's loopback that containers may reach."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"open\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def attempt(name: str, command: str) -> str:
    """A line ``NAME STATUS`` and what was answered, made one line."""
    return f'said=$({command} 2>&1); echo "{name} $? $(echo "$said" | head -c 300 | tr -d "\\n\\r")"'


@pytest.fixture(scope="module", params=KINDS)
async def attempts(request: pytest.FixtureRequest, vm: ovm.OVM, podman: Podman) -> Attempts:
    """What comes of each attempt in a container of this kind."""
    return await attempts_from(podman, KINDS[request.param], vm.info)


async def attempts_from(podman: Podman, kind: list[str], info: ovm.Info) -> Attempts:
    """Each wall's name, the exit status of the attempt, and what came back."""
    async with host_service() as service:
        get = "printf 'GET %s HTTP/1.0\\r\\n\\r\\n'"
        order = '{"local":"127.0.0.1:45454","remote":":80","protocol":"tcp"}'
        post = f"printf 'POST {EXPOSE} HTTP/1.0\\r\\nContent-Length: {len(order)}\\r\\n\\r\\n%s' '{order}'"
        script = "\n".join(
            (
                attempt("allowed", f"nc -w 5 192.168.127.254 {service} </dev/null"),
                attempt("dns", "nc -w 5 192.168.127.1 53 </dev/null"),
                attempt("engine", f"{get % '/libpod/_ping'} | nc -w 5 192.168.127.2 58125"),
                attempt("engine over loopback", f"{get % '/libpod/_ping'} | nc -w 5 127.0.0.1 58125"),
                attempt("endpoint", f"{get % '/services/forwarder/all'} | nc -w 5 192.168.127.1 80"),
                attempt(
                    "podman through the host", f"{get % '/libpod/_ping'} | nc -w 5 192.168.127.254 {info.podman_port}"
                ),
                attempt("ssh through the host", f"nc -w 5 192.168.127.254 {info.ssh_port} </dev/null"),
                attempt("ssh", "nc -w 5 192.168.127.2 22 </dev/null"),
                attempt("orders a port", f"{post} | nc -w 20 127.0.0.1 80 | grep -q ' 200 ' && echo {OPEN}"),
            )
        )
        ran = await podman("run", "--rm", *kind, BUSYBOX_IMAGE, "sh", "-c", script)
    found = {}
    for line in ran.out.splitlines():
        for name in NAMES:
            if line.startswith(f"{name} ") and line[len(name) + 1 :].split(" ", 1)[0].isdigit():
                status, _, said = line[len(name) + 1 :].partition(" ")
                found[name] = (int(status), said)
    assert found.keys() == set(NAMES), ran
    return found


WALLS = (
    "engine",
    "engine over loopback",
    "endpoint",
    "podman through the host",
    "ssh through the host",
    "ssh",
    "orders a port",
)
NAMES = ("allowed", "dns", *WALLS)


@pytest.mark.parametrize("wall", WALLS)
async def test_wall(attempts: Attempts, wall: str) -> None:
    """No answer comes back, and no connection is made."""
    status, said = attempts[wall]
    assert status != 0, (wall, said)
    assert not any(answer in said for answer in ANSWERS)


async def test_what_is_allowed_works(attempts: Attempts) -> None:
    """The same container reaches the host's other services and the name server, so the walls mean something."""
    assert attempts["allowed"] == (0, OPEN)
    assert attempts["dns"][0] == 0


async def test_nothing_was_opened(vm: ovm.OVM, attempts: Attempts) -> None:
    """No container's order opened a port on the host."""
    assert attempts
    assert 45454 not in {forward.host_port for forward in vm.ports()}
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", 45454)


BY_THE_FIREWALL = {
    "engine": "200 OK",
    "endpoint": "200 OK",
    "podman through the host": "200 OK",
    "ssh through the host": "SSH-2.0",
    "ssh": "SSH-2.0",
}
"""What the attempts get without it. In the rest nobody listens, or the manager asks who is there."""


async def test_without_the_firewall_they_get_through(vm: ovm.OVM, podman: Podman) -> None:
    """The walls are the firewall's: root in the guest may take it off, and then each attempt is answered."""
    await vm.exec(["sh", "-c", "nft delete table inet ovm && nft delete table netdev ovm"])
    try:
        found = await attempts_from(podman, [], vm.info)
    finally:
        await vm.exec(["/usr/lib/ovm/firewall"])
    for wall, answer in BY_THE_FIREWALL.items():
        assert answer in found[wall][1], (wall, found[wall])
    again = await attempts_from(podman, [], vm.info)
    assert all(again[wall][0] != 0 for wall in WALLS), again
