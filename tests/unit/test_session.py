"""A running machine's ports: what podman may have opened, and what is the user's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from networks import published, started
from ovm.errors import OptionError, PortError
from ovm.guest.clock import Clock
from ovm.guest.ssh import SSH
from ovm.machine.running import Session
from ovm.model.options import Options
from ovm.model.ports import Forward
from ovm.network.host_ports import free_port
from ovm.paths import KeyPaths, SocketPaths
from ovm.wire.error import WireError


class FakeNetwork:
    """gvproxy's rules without gvproxy: a key can be open once, and only what is open can be closed."""

    def __init__(self) -> None:
        self.open: dict[tuple[str, str], Forward] = {}
        self.calls: list[str] = []
        self.taken: set[int] = set()

    @property
    def forwards(self) -> dict[tuple[str, str], Forward]:
        return dict(self.open)

    def keeps(self, forward: Forward) -> bool:
        return self.open.get(forward.key) == forward

    async def expose(self, forward: Forward) -> None:
        self.calls.append(f"expose {forward.protocol} {forward.local}")
        if forward.key in self.open or forward.host_port in self.taken:
            raise PortError(f"{forward.local}: address already in use")
        self.open[forward.key] = forward

    async def unexpose(self, forward: Forward) -> None:
        self.calls.append(f"unexpose {forward.protocol} {forward.local}")
        if self.open.pop(forward.key, None) is None:
            raise PortError("proxy not found")

    async def pick(self, guest_port: int, *, protocol="tcp", address="127.0.0.1", listed=False) -> Forward:
        assert listed
        forward = Forward(protocol=protocol, host_address=address, host_port=40000, guest_port=guest_port)
        await self.expose(forward)
        return forward


def make_session(publish_address: str = "127.0.0.1") -> Session:
    options = Options.of(
        origin_path={name: f"/o/{name}" for name in ("gvproxy", "kernel", "initrd", "rootfs")},
        versions=dict.fromkeys(("gvproxy", "kernel", "initrd", "rootfs"), "1"),
        target_dir="/t",
        socket_dir="/s",
        log_dir="/l",
        ssh_key_dir="/k",
        publish_address=publish_address,
    )
    ssh = SSH(1, KeyPaths(Path("/k")))
    return Session(
        options=options,
        network=FakeNetwork(),
        vm=None,
        channel=None,
        ssh=ssh,
        clock=Clock(ssh),
        sockets=SocketPaths(Path("/s")),
        podman_port=None,
        guard=None,
        helpers_changed=lambda: None,
        console_log=Path("/l/console.log"),
    )


@pytest.fixture
async def session() -> Session:
    return make_session()


def addresses(session: Session) -> list[tuple[str, str, int, str]]:
    assert set(session.forwards) == set(session.network.open)
    return [(f.protocol, f.local, f.guest_port, f.purpose) for f in session.forwards.values()]


@pytest.mark.parametrize(
    ("default", "asked", "bound"),
    [
        ("127.0.0.1", "", "127.0.0.1:8080"),
        ("127.0.0.1", "0.0.0.0", "0.0.0.0:8080"),
        ("127.0.0.1", "127.0.0.2", "127.0.0.2:8080"),
        ("127.0.0.1", "::1", "[::1]:8080"),
        ("0.0.0.0", "", "0.0.0.0:8080"),
        ("0.0.0.0", "127.0.0.1", "127.0.0.1:8080"),
    ],
)
async def test_where_a_published_port_is_bound(default, asked, bound):
    """A published port is bound where ``-p`` says, else at the default, which is this host alone."""
    session = make_session(default)
    await session.publish(published("tcp", asked, 8080), True)
    assert addresses(session) == [("tcp", bound, 8080, "container")]


async def test_an_address_that_is_none_is_refused(session):
    """Whatever else stands where the address should is refused before gvproxy sees it."""
    with pytest.raises(OptionError):
        await session.publish(published("tcp", "evil.example", 80), True)
    assert session.network.calls == []


async def test_a_refused_port_is_reported_once(session):
    """The guest retries a container whose port is taken; the report comes again only after the port was open."""
    reported = []
    session.on_refused = reported.append
    session.network.taken.add(8080)
    for _ in range(3):
        with pytest.raises(PortError):
            await session.publish(published("tcp", "", 8080), True)
    assert len(reported) == 1
    session.network.taken.clear()
    await session.publish(published("tcp", "", 8080), True)
    await session.publish(published("tcp", "", 8080), False)
    session.network.taken.add(8080)
    with pytest.raises(PortError):
        await session.publish(published("tcp", "", 8080), True)
    assert len(reported) == 2


async def test_podman_may_repeat_itself(session):
    """Announcing an open port again changes nothing, and it is closed once."""
    wanted = published("tcp", "", 8080)
    await session.publish(wanted, True)
    await session.publish(wanted, True)
    await session.publish(wanted, False)
    await session.publish(wanted, False)
    assert session.network.calls == ["expose tcp 127.0.0.1:8080", "unexpose tcp 127.0.0.1:8080"]
    assert addresses(session) == []


async def test_tcp_and_udp_are_two_ports(session):
    """The same number can be published for both protocols, and closing one leaves the other."""
    await session.publish(published("tcp", "", 53), True)
    await session.publish(published("udp", "", 53), True)
    await session.publish(published("tcp", "", 53), False)
    assert addresses(session) == [("udp", "127.0.0.1:53", 53, "container")]


async def test_a_refused_port_is_not_remembered(session):
    """A port that could not be opened is not listed, and can be asked for again."""
    session.network.taken.add(8080)
    with pytest.raises(PortError):
        await session.publish(published("tcp", "", 8080), True)
    assert addresses(session) == []
    session.network.taken.clear()
    await session.publish(published("tcp", "", 8080), True)
    assert len(addresses(session)) == 1


async def test_a_container_cannot_take_or_close_what_the_user_exported(session):
    """An exported port is neither given to a container nor closed by one."""
    exported = await session.export(8080, 80, "tcp", "127.0.0.1")
    with pytest.raises(PortError, match="in use"):
        await session.publish(published("tcp", "", 8080), True)
    await session.publish(published("tcp", "", 8080), False)
    assert list(session.forwards.values()) == [exported]
    assert exported.purpose == "export"


async def test_the_user_cannot_close_a_containers_port(session):
    """``unexport_port`` closes what was exported, not what a container published; the error lists what is open."""
    await session.publish(published("tcp", "", 8080), True)
    with pytest.raises(PortError, match="is not exported") as caught:
        await session.unexport(8080, "tcp", "127.0.0.1")
    assert "127.0.0.1:8080" in caught.value.hint
    assert len(addresses(session)) == 1


async def test_exporting_twice_is_fine(session):
    """Exporting the same port to the same guest port again changes nothing, to another is refused."""
    first = await session.export(8080, 80, "tcp", "127.0.0.1")
    assert await session.export(8080, 80, "tcp", "127.0.0.1") == first
    with pytest.raises(PortError):
        await session.export(8080, 81, "tcp", "127.0.0.1")
    assert addresses(session) == [("tcp", "127.0.0.1:8080", 80, "export")]


async def test_what_was_exported_can_be_closed(session):
    """An exported port can be closed, once, however it came by its number."""
    picked = await session.export(0, 80, "tcp", "127.0.0.1")
    assert picked.host_port != 0
    await session.unexport(picked.host_port, "tcp", "127.0.0.1")
    assert addresses(session) == []
    with pytest.raises(PortError) as caught:
        await session.unexport(picked.host_port, "tcp", "127.0.0.1")
    assert "none" in caught.value.hint


async def test_a_reboot_forgets_the_containers_ports_alone(session):
    """After the guest was reset, exported ports are still open and containers' are not."""
    await session.export(1, 1, "tcp", "127.0.0.1")
    await session.publish(published("tcp", "", 2), True)
    await session.publish(published("udp", "", 3), True)
    session.network.open.pop(("udp", "127.0.0.1:3"))  # even if gvproxy has lost one of them
    async with asyncio.timeout(5):
        await session.guest_was_reset()
    assert addresses(session) == [("tcp", "127.0.0.1:1", 1, "export")]


@pytest.fixture
async def real(session, group, gvproxy, short_path, tmp_path) -> AsyncIterator[Session]:
    """A session with a real gvproxy."""
    async with started(group, gvproxy, SocketPaths(short_path), tmp_path / "log", wire="qemu") as session.network:
        yield session


async def test_a_cancelled_export_leaves_no_port_that_is_not_listed(real, unused_port, monkeypatch):
    """What listens on the host is what ``ports()`` lists, although an export was cancelled after gvproxy had bound."""
    post, bound = real.network._api.post, asyncio.Event()

    async def slowly(path, body):
        await post(path, body)
        bound.set()
        await asyncio.sleep(0)

    monkeypatch.setattr(real.network._api, "post", slowly)
    exporting = asyncio.create_task(real.export(unused_port, 80, "tcp", "127.0.0.1"))
    await bound.wait()
    exporting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exporting
    other = await real.export(0, 80, "tcp", "127.0.0.1")
    assert list(real.forwards.values()) == [other]
    assert free_port("tcp", "127.0.0.1", unused_port) == unused_port


async def test_a_port_that_is_unexported_during_an_outage_stays_closed(real, unused_port):
    """The next gvproxy does not open a port that was unexported while there was none."""
    await real.export(unused_port, 80, "tcp", "127.0.0.1")
    await real.network.begin_again()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            await real.unexport(unused_port, "tcp", "127.0.0.1")
    await real.network.reopen()
    assert real.forwards == {}
    assert free_port("tcp", "127.0.0.1", unused_port) == unused_port


async def test_a_port_that_is_being_closed_is_not_taken_for_open(real, unused_port, monkeypatch):
    """A port that could not be closed can be exported again, and is open then."""
    wanted = (unused_port, 80, "tcp", "127.0.0.1")
    exported = await real.export(*wanted)
    with monkeypatch.context() as deaf:
        deaf.setattr(real.network._api, "post", no_answer)
        with pytest.raises(PortError):
            await real.unexport(unused_port, "tcp", "127.0.0.1")
    assert await real.export(*wanted) == exported
    await real.network.settle()
    assert list(real.forwards.values()) == [exported]
    assert free_port("tcp", "127.0.0.1", unused_port) is None


async def no_answer(_path: str, _body: object) -> None:
    raise WireError("no answer")


async def test_the_network_is_restored_without_reaching_a_guest_that_boots(session):
    """A guest that boots or is paused is not waited for, and what could not be reopened is returned."""
    lost = PortError("tcp 127.0.0.1:8080 could not be opened again")
    done: list[str] = []

    async def begin_again() -> None:
        done.append("begin")

    async def reopen() -> list[PortError]:
        done.append("reopen")
        return [lost]

    async def replug(_path: Path) -> None:
        done.append("replug")

    session.network.begin_again, session.network.reopen = begin_again, reopen
    session.vm = SimpleNamespace(replug=replug)
    async with asyncio.timeout(1):
        assert await session.restore_network(reach=False) == [lost]
    assert done == ["begin", "replug", "reopen"]
