"""The network: a real gvproxy, without a guest."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import pytest

from networks import started
from ovm.errors import HelperExited, PortError, StopError
from ovm.model.ports import Forward, join
from ovm.network import forwarding
from ovm.network import gvproxy as gvproxy_module
from ovm.network.gvproxy import argv
from ovm.network.host_ports import free_port
from ovm.paths import SocketPaths
from ovm.process.child import Child
from ovm.process.probe import GVPROXY, check_helper
from ovm.wire.error import WireError


@pytest.fixture
async def network(group, gvproxy, short_path, tmp_path):
    """A running gvproxy."""
    log = tmp_path / "gvproxy.log"
    async with started(group, gvproxy, SocketPaths(short_path), log, wire="qemu") as running:
        yield running


def forward(port: int, protocol: str = "tcp", address: str = "127.0.0.1") -> Forward:
    return Forward(protocol=protocol, host_address=address, host_port=port, guest_port=80)


def listens(protocol: str, port: int, address: str = "127.0.0.1") -> bool:
    return free_port(protocol, address, port) is None


@pytest.mark.parametrize(
    ("wire", "card"),
    [
        ("qemu", ("-listen-qemu", "unix:///s/net/net.sock")),
        ("vfkit", ("-listen-vfkit", "unixgram:///s/net/net.sock")),
        ("channel", ("-listen", "unix:///s/net/net.sock")),
    ],
)
def test_the_command_line(wire, card):
    """gvproxy gets its two sockets, our MTU and no ssh port of its own, so that nothing listens unasked."""
    assert argv(Path("/t/gvproxy"), SocketPaths(Path("/s")), wire) == [
        "/t/gvproxy",
        *("-mtu", "1500"),
        *("-ssh-port", "-1"),
        *("-listen", "unix:///s/net/network.sock"),
        *card,
    ]


async def test_it_is_up_with_both_sockets_private(network, short_path):
    """When the start is over both sockets are there, for their owner alone."""
    sockets = SocketPaths(short_path)
    for path in (sockets.network_api, sockets.network_card):
        assert path.is_socket()
        assert path.stat().st_mode & 0o077 == 0
    assert network.child.running


def accepts(path: Path, kind: socket.SocketKind) -> bool:
    """Whether a connection succeeds: a stream socket that is bound refuses it until it listens."""
    with socket.socket(socket.AF_UNIX, kind) as peer:
        return peer.connect_ex(str(path)) == 0


@pytest.mark.parametrize("wire", ["qemu", "vfkit", "channel"])
async def test_each_wire_is_understood(group, gvproxy, short_path, tmp_path, wire):
    """gvproxy's flags cannot be imported, so it is the judge itself: it starts and makes the socket it was told to."""
    if wire == "vfkit" and sys.platform != "darwin" and (await check_helper(gvproxy, GVPROXY)) < (0, 8, 9):
        pytest.skip("before 0.8.9 gvproxy serves vfkit on macOS alone")
    sockets = SocketPaths(short_path)
    async with started(group, gvproxy, sockets, tmp_path / "gvproxy.log", wire=wire) as network:
        assert accepts(sockets.network_card, socket.SOCK_DGRAM if wire == "vfkit" else socket.SOCK_STREAM)
        assert network.child.running


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_port_is_opened_and_closed(network, unused_port, protocol):
    """An exposed port listens on the very address and no other, and an unexposed one no more."""
    opened = forward(unused_port, protocol)
    await network.expose(opened)
    assert listens(protocol, unused_port)
    assert not listens(protocol, unused_port, "127.0.0.2")
    await network.unexpose(opened)
    assert not listens(protocol, unused_port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
async def test_all_addresses_are_those_of_ipv4_and_ipv6(network, unused_port, address):
    """Go binds both families for either of the two."""
    await network.expose(forward(unused_port, address=address))
    for one in ("127.0.0.1", "::1"):
        with socket.create_connection((one, unused_port), timeout=5):
            pass


async def test_a_taken_port_is_told(network):
    """A port that somebody else has is a PortError with advice on how to find out who."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match="address already in use") as caught:
            await network.expose(forward(port))
    assert f"see who has {port} with `ss " in caught.value.hint
    await network.expose(forward(port))  # it is free now


async def test_a_taken_udp_port_is_told(network):
    """A UDP port that somebody else has is a PortError too."""
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(PortError, match="address already in use"):
            await network.expose(forward(taken.getsockname()[1], "udp"))


async def test_a_port_of_our_own_is_taken_as_well(network, unused_port):
    """Exposing the same port twice is a PortError, and the first stays open."""
    await network.expose(forward(unused_port))
    with pytest.raises(PortError, match="in use") as caught:
        await network.expose(forward(unused_port))
    assert caught.value.hint
    assert listens("tcp", unused_port)


async def test_an_address_that_is_not_ours_is_told_as_such(network, unused_port):
    """An address this host does not have is a PortError in these words, not a port in use."""
    with pytest.raises(PortError, match="cannot assign requested address"):
        await network.expose(forward(unused_port, address="203.0.113.1"))
    with pytest.raises(PortError, match="cannot assign requested address"):
        await network.pick(80, first=unused_port, address="203.0.113.1")


async def test_what_is_not_open_cannot_be_closed(network, unused_port):
    """Closing a port that is not open is a PortError."""
    with pytest.raises(PortError, match="not found"):
        await network.unexpose(forward(unused_port))


async def test_a_port_is_picked_from_the_first_upward(network):
    """The first free port from the given one up is taken; taken ones are passed over, gvproxy's own too."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        one = await network.pick(22, first=first)
        two = await network.pick(22, first=first)
    assert first < one.host_port < two.host_port
    assert (one.guest_port, one.protocol, one.host_address) == (22, "tcp", "127.0.0.1")
    assert listens("tcp", one.host_port)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_any_free_port_can_be_had(network, protocol):
    """Without a first port any free one is picked, and told."""
    picked = await network.pick(80, protocol=protocol)
    assert picked.host_port > 0
    assert listens(protocol, picked.host_port)


async def test_a_lost_race_picks_again(network, unused_port, monkeypatch):
    """A port that somebody takes between our look and gvproxy's bind is passed over."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answers = iter([taken.getsockname()[1], unused_port])
        monkeypatch.setattr(forwarding, "free_port", lambda *_: next(answers))
        assert (await network.pick(80)).host_port == unused_port


async def test_no_port_to_be_had_is_told(network, monkeypatch):
    """When no port is free the error names the protocol, the address and where the search began."""
    monkeypatch.setattr(forwarding, "free_port", lambda *_: None)
    with pytest.raises(PortError, match=r"no udp port of 127\.0\.0\.1 is free from 65530 up"):
        await network.pick(80, first=65530, protocol="udp")


async def test_a_socket_can_lead_to_the_guest(network, short_path):
    """A unix socket for podman is made, for its owner alone."""
    path = SocketPaths(short_path).podman
    await network.expose_socket(SocketPaths(short_path).made_by_gvproxy(path), 58125)
    assert path.is_socket()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_socket_that_cannot_be_made_is_told(network, short_path):
    """A socket in a directory that is not there is a PortError that names it."""
    with pytest.raises(PortError, match=r"missing/podman\.sock cannot be made"):
        await network.expose_socket(short_path / "missing" / "podman.sock", 58125)


async def test_two_machines_have_two_networks(group, network, gvproxy, short_path, tmp_path):
    """Two gvproxies run side by side, and each opens ports of its own."""
    second = short_path / "second"
    second.mkdir()
    async with started(group, gvproxy, SocketPaths(second), tmp_path / "second.log", wire="qemu") as other:
        one, two = await asyncio.gather(network.pick(80), other.pick(80))
        assert one.host_port != two.host_port
        assert listens("tcp", two.host_port)
    assert not listens("tcp", two.host_port)
    assert listens("tcp", one.host_port)


async def test_a_gvproxy_that_ends_at_once_is_told(group, gvproxy, short_path, tmp_path, monkeypatch):
    """It is HelperExited with its last words, not a wait until the deadline."""
    monkeypatch.setattr(gvproxy_module, "argv", lambda program, *_: [str(program), "-listen", "unix:///missing/x.sock"])
    async with asyncio.timeout(10):
        with pytest.raises(HelperExited) as caught:
            async with started(group, gvproxy, SocketPaths(short_path), tmp_path / "gvproxy.log", wire="qemu"):
                pass
    assert caught.value.stage == "network"
    assert caught.value.exit_reason.startswith("exit status")
    assert "no such file" in "".join(caught.value.log_tail)


LATE = """
import socket, sys, time
api, card = (socket.socket(socket.AF_UNIX) for _ in range(2))
api.bind(sys.argv[1])
api.listen()
api.accept()
time.sleep(0.05)  # the time between its two sockets is what is tested
card.bind(sys.argv[2])
time.sleep(0.05)
card.listen()
card.accept()
"""


async def test_a_hypervisor_can_connect_once_it_is_up(group, short_path, tmp_path):
    """A gvproxy that opens the card's socket late is not up before it listens there, and sees no peer before."""
    sockets = SocketPaths(short_path)
    gvproxy_module.lay_out(sockets)
    paths = [str(sockets.made_by_gvproxy(link)) for link in (sockets.network_api, sockets.network_card)]
    log = tmp_path / "log"
    late = gvproxy_module.Gvproxy(
        partial(group.spawn, "gvproxy", [sys.executable, "-c", LATE, *paths], log_path=log), sockets, log
    )
    try:
        await late.begin()
        assert late.child.running
        assert accepts(sockets.network_card, socket.SOCK_STREAM)
    finally:
        await late.end()


async def test_an_end_that_fails_does_not_hide_the_first_error(group, gvproxy, short_path, tmp_path, monkeypatch):
    """The error of the block is raised; that gvproxy could not be ended is a note of it."""

    async def refuses(child: Child, **_more: object) -> None:
        raise StopError(f"{child.name} cannot be ended")

    async def fails() -> None:
        async with started(group, gvproxy, SocketPaths(short_path), tmp_path / "log", wire="qemu"):
            monkeypatch.setattr(Child, "end", refuses)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        await fails()
    monkeypatch.undo()
    assert "gvproxy cannot be ended" in "".join(caught.value.__notes__)


async def test_it_ends_with_its_block(group, gvproxy, short_path, tmp_path):
    """Left, gvproxy is gone and what it had opened is closed."""
    async with started(group, gvproxy, SocketPaths(short_path), tmp_path / "log", wire="qemu") as running:
        opened = await running.pick(80)
    assert not running.child.running
    assert not listens("tcp", opened.host_port)


async def test_a_dead_gvproxy_is_told(network):
    """Asking a gvproxy that was killed is a PortError, not a wait."""
    await network.child.end(grace_s=0)
    async with asyncio.timeout(5):
        with pytest.raises(PortError):
            await network.pick(80)


class Interrupted:
    """gvproxy's API, with a request that waits after gvproxy has obeyed it, or whose answer is lost."""

    def __init__(self, api) -> None:
        self.api = api
        self.obeyed = asyncio.Event()
        self.go_on = asyncio.Event()
        self.lose = 0
        """How many requests get no answer, although gvproxy obeys them."""
        self.deaf = False
        """Whether gvproxy gets no request at all."""

    async def post(self, path, body):
        if self.deaf:
            raise WireError("no answer")
        answer = await self.api.post(path, body)
        self.obeyed.set()
        await self.go_on.wait()
        if self.lose:
            self.lose -= 1
            raise WireError("no answer")
        return answer


@pytest.fixture
def api(network) -> Interrupted:
    network._ports._api = Interrupted(network._ports._api)
    return network._ports._api


@pytest.mark.parametrize("how", ["expose", "pick"])
async def test_a_port_whose_opening_is_cancelled_is_closed(network, api, unused_port, how):
    """A cancelled expose() or pick() leaves no open port, although gvproxy had bound it."""
    opened = forward(unused_port)
    opening = asyncio.create_task(
        network.expose(opened) if how == "expose" else network.pick(80, first=unused_port, listed=True)
    )
    await api.obeyed.wait()
    assert listens("tcp", unused_port)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    api.go_on.set()
    await network.settle()
    assert not listens("tcp", unused_port)
    assert network.forwards == {}
    await network.expose(opened)
    assert network.forwards == {opened.key: opened}


async def test_a_cancelled_port_is_free_for_the_next_call(network, api, unused_port):
    """An expose() of the very port that waits behind a cancelled one succeeds."""
    opened = forward(unused_port)
    opening = asyncio.create_task(network.expose(opened))
    await api.obeyed.wait()
    opening.cancel()
    again = asyncio.create_task(network.expose(opened))
    with pytest.raises(asyncio.CancelledError):
        await opening
    api.go_on.set()
    await again
    assert network.forwards == {opened.key: opened}
    assert listens("tcp", unused_port)


async def test_a_port_whose_answer_was_lost_is_closed(network, api, unused_port):
    """A port that gvproxy bound without our hearing of it is closed when gvproxy answers again."""
    api.go_on.set()
    api.lose = 1
    with pytest.raises(PortError, match="no answer"):
        await network.expose(forward(unused_port))
    assert network.forwards == {}
    assert listens("tcp", unused_port)
    await network.settle()
    assert not listens("tcp", unused_port)


async def test_a_port_that_could_not_be_closed_is_listed_until_it_is(network, api, unused_port):
    """A failed unexpose() leaves the port listed as long as it is open, and it is closed when gvproxy answers."""
    opened = forward(unused_port)
    api.go_on.set()
    await network.expose(opened)
    api.deaf = True
    with pytest.raises(PortError, match="no answer"):
        await network.unexpose(opened)
    assert network.forwards == {opened.key: opened}
    assert not network.keeps(opened)
    api.deaf = False
    await network.settle()
    assert network.forwards == {}
    assert not listens("tcp", unused_port)


async def test_a_cancelled_close_closes(network, api, unused_port):
    """A cancelled unexpose() leaves no port that is closed but listed, or open but not listed."""
    opened = forward(unused_port)
    api.go_on.set()
    await network.expose(opened)
    api.go_on.clear()
    api.obeyed.clear()
    closing = asyncio.create_task(network.unexpose(opened))
    await api.obeyed.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    api.go_on.set()
    await network.settle()
    assert network.forwards == {}
    assert not listens("tcp", unused_port)


async def test_a_port_that_gvproxy_has_lost_is_closed(network, unused_port):
    """A port that root in the guest closed by gvproxy's API is closed, not an error, and is no longer listed."""
    opened = forward(unused_port)
    await network.expose(opened)
    await network._ports._api.post("/services/forwarder/unexpose", {"local": opened.local, "protocol": "tcp"})
    await network.unexpose(opened)
    assert network.forwards == {}


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_port_that_is_closed_during_an_outage_stays_closed(network, unused_port, replaced):
    """A port that is unexposed while gvproxy is down is not opened by the next gvproxy, and the others are."""
    closed = forward(unused_port)
    await network.expose(closed)
    kept = await network.pick(80, listed=True)
    own = await network.pick(22)
    network._ports.gvproxy_is_down()
    if not replaced:
        async with asyncio.timeout(1):
            await network.unexpose(closed)
    await network.begin_again()
    if replaced:
        async with asyncio.timeout(1):
            await network.unexpose(closed)
    assert network.forwards == {kept.key: kept}
    assert await network.reopen() == []
    assert network.forwards == {kept.key: kept}
    assert not listens("tcp", unused_port)
    assert listens("tcp", kept.host_port)
    assert listens("tcp", own.host_port)


async def test_a_port_that_is_closed_while_it_is_reopened_stays_closed(network, unused_port):
    """A port that is unexposed at the moment in which the next gvproxy opens it is closed, and is not listed."""
    opened = forward(unused_port)
    await network.expose(opened)
    await network.begin_again()
    interrupted = Interrupted(network._ports._api)
    network._ports._api = interrupted
    reopening = asyncio.create_task(network.reopen())
    await interrupted.obeyed.wait()
    await network.unexpose(opened)
    assert network.forwards == {}
    interrupted.go_on.set()
    assert await reopening == []
    assert not listens("tcp", unused_port)


async def test_calls_that_wait_when_the_network_ends_are_refused(group, gvproxy, short_path, tmp_path, unused_port):
    """A call that waits for another gvproxy raises PortError when the machine stops; it is not cancelled."""
    opened = forward(unused_port)
    async with started(group, gvproxy, SocketPaths(short_path), tmp_path / "log", wire="qemu") as running:
        running._ports.gvproxy_is_down()
        waiting = asyncio.create_task(running.expose(opened))
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        with pytest.raises(PortError):
            await waiting


async def test_a_port_that_somebody_took_meanwhile_is_lost(network):
    """reopen() returns the error of a listed port that is taken, forgets the port, and raises for the machine's own."""
    lost, own = await network.pick(80, listed=True), await network.pick(22)
    await network.begin_again()
    with socket.create_server(("127.0.0.1", lost.host_port)):
        (error,) = await network.reopen()
    assert lost.local in error.message
    assert network.forwards == {}
    await network.begin_again()
    with socket.create_server(("127.0.0.1", own.host_port)), pytest.raises(PortError, match=own.local):
        await network.reopen()
    await network.begin_again()
    assert await network.reopen() == []
    assert listens("tcp", own.host_port)


async def test_whether_gvproxy_answers(network, monkeypatch):
    """A gvproxy answers while it runs, not while it is stopped, and not after its end."""
    monkeypatch.setattr(forwarding, "ANSWER_S", 0.1)
    os.kill(network.child.pid, signal.SIGSTOP)
    assert not await network.answers()
    os.kill(network.child.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert await network.answers()
    await network.child.end(grace_s=0)
    assert not await network.answers()


@pytest.mark.parametrize(
    ("address", "port", "joined"),
    [("127.0.0.1", 80, "127.0.0.1:80"), ("0.0.0.0", 1, "0.0.0.0:1"), ("::1", 80, "[::1]:80"), ("::", 80, "[::]:80")],
)
def test_addresses_are_joined_with_ports(address, port, joined):
    """An IPv6 address gets its brackets."""
    assert join(address, port) == joined
    assert forward(port, address=address).key == ("tcp", joined)
