"""What is carried into a guest when it is asked for: name servers, proxies, the ssh agent; and foreign programs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import tarfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import foreign
import ovm
import under
from full import BUSYBOX_IMAGE, MachineOptions, Podman, busybox_tar, eventually
from ovm.host import environment as surroundings

pytestmark = pytest.mark.full

HOST = "192.168.127.254"
ANSWER = "203.0.113.7"
AGENT = "/run/ovm/ssh-agent.sock"
LIST_KEYS = """
socket my $agent, 1, 1, 0 or die; connect $agent, pack 'S a*', 1, $ARGV[0] or die "connect: $!";
syswrite $agent, "\\0\\0\\0\\1\\x0b"; sysread $agent, my $answer, 9; print join ' ', unpack 'x4 C N', $answer;
"""
"""Asks an agent, without a program of ssh's, for its keys; says the kind of its answer, 12, and how many there are."""


@dataclass
class Around:
    """What there is on the host for the machine of these tests."""

    agent: Path
    key: Path
    proxy: int
    names: list[str] = field(default_factory=list)
    """That the name server was asked for."""
    fetched: list[str] = field(default_factory=list)
    """What the proxy was asked for, and by what means."""


class NameServer(asyncio.DatagramProtocol):
    """Knows one address, of all that ends in .ovm.example."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        labels, at = [], 12
        while length := data[at]:
            labels.append(data[at + 1 : at + 1 + length].decode())
            at += 1 + length
        name, question = ".".join(labels).lower(), data[12 : at + 5]
        self.names.append(name)
        known = name.endswith(".ovm.example")
        found = known and question[-4:-2] == b"\0\1"  # the question is for an IPv4 address
        flags = b"\x81\x80" if known else b"\x81\x83"  # an answer, or there is no such name
        record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + bytes(map(int, ANSWER.split(".")))
        counts = b"\0\1" + (b"\0\1" if found else b"\0\0") + b"\0\0\0\0"
        self.transport.sendto(data[:2] + flags + counts + question + (record if found else b""), addr)


@pytest.fixture(scope="module")
async def around(short_tmp: Callable[[str], Path], hypervisor: str) -> AsyncIterator[Around]:
    """A name server, a proxy and an agent with one key, all on the host's loopback."""
    if os.geteuid() != 0:
        pytest.skip("serving names takes root: the port is 53")
    base = short_tmp(f"around-{hypervisor}")
    found = Around(base / "agent.sock", base / "key", 0)

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            found.fetched.append((await reader.readline()).decode().strip())
            writer.write(b"HTTP/1.0 200 OK\r\n\r\nby way of the proxy\n")
            await writer.drain()

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: NameServer(found.names), ("127.0.0.1", 53))
    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    found.proxy = server.sockets[0].getsockname()[1]
    agent = await asyncio.create_subprocess_exec(
        "ssh-agent", "-D", "-a", found.agent, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await ran("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "a key of the host", "-f", found.key)
        await eventually(lambda: asyncio.to_thread(found.agent.exists))
        await ran("ssh-add", "-q", found.key, environment={"SSH_AUTH_SOCK": str(found.agent)})
        yield found
    finally:
        agent.terminate()
        await agent.wait()
        server.close()
        transport.close()


async def ran(*argv: str | Path, environment: dict[str, str] | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=os.environ | (environment or {}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode().strip()


@pytest.fixture(scope="module")
async def machine(options_for: MachineOptions, around: Around) -> AsyncIterator[ovm.OVM]:
    """A machine with all of it, started by a process that knows of agent and proxy by its environment."""
    with pytest.MonkeyPatch.context() as host:
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            host.delenv(name)
        host.setenv("http_proxy", f"http://127.0.0.1:{around.proxy}")
        host.setenv("SSH_AUTH_SOCK", str(around.agent))
        created = await under.create(
            options_for("around"),
            dns=[HOST],
            ssh_agent=True,
            foreign_arch=True,
            environment=surroundings.host_proxies(),
        )
        async with created:
            yield created


@pytest.fixture(scope="module")
async def engine(machine: ovm.OVM, tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """A client of it, with the busybox image."""
    home = tmp_path_factory.mktemp("podman")
    client = Podman(machine, home)
    await client("import", busybox_tar(home / "busybox.tar"), BUSYBOX_IMAGE)
    return client


async def test_names_are_asked_of_the_given_servers(machine: ovm.OVM, engine: Podman, around: Around) -> None:
    """By the guest and by containers, with podman's own name server before them and without."""
    assert (await machine.exec(["grep", "nameserver", "/etc/resolv.conf"])).text == f"nameserver {HOST}"
    assert (await machine.exec(["getent", "hosts", "guest.ovm.example"])).text.split()[0] == ANSWER
    await engine("network", "create", "named")
    for network in ("podman", "named"):
        name = f"{network}.ovm.example"
        told = await engine("run", "--rm", "--network", network, BUSYBOX_IMAGE, "getent", "hosts", name)
        assert told.out.split()[0] == ANSWER
    assert {"guest.ovm.example", "podman.ovm.example", "named.ovm.example"} <= set(around.names)
    assert (await machine.exec(["getent", "hosts", "elsewhere.example"])).exit_status == 2, "nobody else is asked"


async def test_the_host_keeps_its_names(machine: ovm.OVM, engine: Podman, around: Around) -> None:
    """No server but gvproxy's knows them: they are in hosts files, and gvproxy can still be asked."""
    for name in ("host.containers.internal", "host.docker.internal"):
        assert (await machine.exec(["getent", "ahostsv4", name])).text.split()[0] == HOST
        for network in ("podman", "host"):
            told = await engine("run", "--rm", "--network", network, BUSYBOX_IMAGE, "getent", "ahostsv4", name)
            assert told.out.split()[0] == HOST
        assert name not in around.names
    asked = await machine.exec(["busybox", "nslookup", "host.containers.internal", "192.168.127.1"])
    assert f"Address: {HOST}" in asked.text


async def test_a_proxy_on_the_hosts_loopback_is_used(machine: ovm.OVM, engine: Podman, around: Around) -> None:
    """By programs in the guest and in containers, under names that only the proxy has to know."""
    url = "http://intranet.example/page"
    assert (await machine.exec(["busybox", "wget", "-q", "-O", "-", url])).text == "by way of the proxy"
    fetched = await engine("run", "--rm", BUSYBOX_IMAGE, "busybox", "wget", "-q", "-O", "-", url)
    assert fetched.out == "by way of the proxy"
    assert [line.split()[:2] for line in around.fetched] == [["GET", url]] * 2
    assert "192.168.127.0/24" in (await machine.exec(["sh", "-c", 'echo "$no_proxy"'])).text


async def test_the_agent_is_lent(machine: ovm.OVM, engine: Podman, around: Around) -> None:
    """To root in the guest, and to containers by a mount: its key is told and signs; the socket is nobody else's."""
    fingerprint = (await ran("ssh-keygen", "-lf", around.key)).split()[1]
    assert fingerprint in (await machine.exec(["ssh-add", "-l"])).text
    public = around.key.with_suffix(".pub").read_bytes()
    signs = ["sh", "-c", "cat >/tmp/key.pub && ssh-add -T /tmp/key.pub"]
    assert (await machine.exec(signs, stdin=public)).exit_status == 0
    assert (await machine.exec(["stat", "-c", "%U %a", AGENT])).text == "root 600"
    mounted = ("-v", f"{AGENT}:/agent", BUSYBOX_IMAGE)
    assert (await engine("run", "--rm", *mounted, "perl", "-e", LIST_KEYS, "/agent")).out == "12 1"


async def test_the_agent_is_lent_again_after_the_connection_was_lost(machine: ovm.OVM) -> None:
    """The manager connects by itself, and the agent is there once more."""
    with contextlib.suppress(ovm.GuestError):
        await machine.exec(["sh", "-c", f"rm {AGENT}; pkill -f '^sshd-session: root'"])

    async def answers() -> bool:
        try:
            return (await machine.exec(["ssh-add", "-l"])).exit_status == 0
        except ovm.GuestError:
            return False

    await eventually(answers)


async def test_containers_of_the_other_architecture_run(engine: Podman, tmp_path: Path) -> None:
    """A program for it does, in an image that has nothing else; as soon as the machine is ready."""
    rootfs = tmp_path / "rootfs.tar"
    with tarfile.open(rootfs, "w") as tar:
        program = foreign.program(f"hello from {foreign.NAME}")
        entry = tarfile.TarInfo("hello")
        entry.size, entry.mode = len(program), 0o755
        tar.addfile(entry, io.BytesIO(program))
    await engine("import", "--arch", foreign.NAME, rootfs, "localhost/foreign")
    ended = await engine("run", "--rm", "--platform", f"linux/{foreign.NAME}", "localhost/foreign", "/hello")
    assert ended.out == f"hello from {foreign.NAME}"


async def test_the_system_is_sound_with_all_of_it(machine: ovm.OVM) -> None:
    """No unit failed."""
    assert (await machine.exec(["systemctl", "--failed", "--plain", "--no-legend"])).text == ""


@pytest.mark.parametrize("wanted", [{"dns": [HOST]}, {"ssh_agent": True}, {"foreign_arch": True}])
async def test_other_guests_are_not_asked_for_it(options_for: MachineOptions, wanted: dict[str, object]) -> None:
    """Silence would be a lie."""
    with pytest.raises(ovm.OptionError, match=f"guest='bare' does not support {next(iter(wanted))}"):
        await under.create(options_for("bare"), guest="bare", **wanted)
