"""What each kind of guest gets from the host: devices, ports, connections, and the order to power off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ovm.disks import data
from ovm.disks.install import Files
from ovm.errors import FileError, GuestError, first_error
from ovm.guest.ovm_core import COMMAND_MAX_BYTES
from ovm.guest.ssh import SSH, ExecResult, make_keys
from ovm.machine import boot, running, shutdown
from ovm.machine.prepare import Prepared
from ovm.machine.profiles import PROFILES
from ovm.machine.running import Session, open_session
from ovm.model.options import Options
from ovm.model.ports import Forward
from ovm.paths import KeyPaths, SocketPaths, TargetPaths

GUESTS = ("bare", "ovm", "ovm-core")
SOCKETS = SocketPaths(Path("/s"))
FILES = Files(gvproxy=Path("/t/gvproxy"), kernel=Path("/t/kernel"), initrd=Path("/t/initrd"), rootfs=Path("/t/rootfs"))


def options(guest: str, **more: Any) -> Options:
    return Options.of(
        origin_path={name: f"/o/{name}" for name in ("gvproxy", "kernel", "initrd", "rootfs")},
        versions=dict.fromkeys(("gvproxy", "kernel", "initrd", "rootfs"), "1"),
        **{"target_dir": "/t", "socket_dir": "/s", "log_dir": "/l", "ssh_key_dir": "/k", "mounts": ()} | more,
        guest=guest,
    )


class Recorder:
    """A network, an ssh connection and a clock that note what is asked of them."""

    port = 2222

    def __init__(self) -> None:
        self.asked: list[str] = []

    # the network
    async def pick(self, guest_port: int, *, first: int = 0, **_more: Any) -> Forward:
        self.asked.append(f"pick {guest_port}")
        return Forward(protocol="tcp", host_address="127.0.0.1", host_port=first, guest_port=guest_port)

    async def expose_socket(self, socket: Path, guest_port: int) -> None:
        self.asked.append(f"socket {socket.name} to port {guest_port}")

    async def expose_tunnel(self, socket: Path, guest_path: str, key: Path) -> None:
        self.asked.append(f"socket {socket.name} to {guest_path} with {key}")

    # ssh
    reach = SSH.reach

    async def connect(self) -> None:
        self.asked.append("connect")

    async def forward_port(self, first: int, guest_path: str) -> int:
        self.asked.append(f"forward to {guest_path}")
        return first + 7

    async def exec(self, argv: tuple[str, ...], **_more: Any) -> ExecResult:
        self.asked.append(f"exec {argv[0]}")
        return ExecResult(0, b"", b"")

    def on_connect(self, _action: object) -> None:
        self.asked.append("serve announcements")

    async def close(self) -> None:
        self.asked.append("close")

    # the clock
    async def sync(self) -> SimpleNamespace:
        self.asked.append("sync")
        return SimpleNamespace(offset_before_s=0.0)

    async def kick_chrony(self) -> None:
        self.asked.append("kick chrony")

    # the hypervisor
    async def resume(self) -> None:
        self.asked.append("resume")

    async def request_stop(self) -> bool:
        self.asked.append("button")
        return False


@contextlib.asynccontextmanager
async def session_of(guest: str, noted: Recorder, **more: Any) -> AsyncIterator[Session]:
    parts = dict.fromkeys(("network", "channel", "podman_port", "guard"))
    session = Session(
        options=options(guest, **more), ssh=noted, clock=noted, vm=noted, sockets=SOCKETS, helpers_changed=list,
        console_log=Path("/l/console.log"), **parts,
    )  # fmt: skip
    async with open_session(session):

        async def ping(**_more: Any) -> None:
            noted.asked.append("ping")

        session.ping = ping
        yield session


DEVICES = {
    "bare": (SOCKETS.boot_initrd, ["ovm-rootfs", "ovm-data"], {"ovm.ready": 1026}, SOCKETS.network_card),
    "ovm": (SOCKETS.boot_initrd, ["ovm-rootfs", "ovm-data"], {"ovm.ready": 1026}, SOCKETS.network_card),
    "ovm-core": (
        FILES.initrd,
        ["ovm-rootfs", "ovm-scratch", "ovm-data"],
        {"ovm.ready": 1026, "ovm.network": 1024, "ovm.command": 1025},
        None,
    ),
}
"""Its initrd, its disks in their order, its channels with their vsock ports, and where its network card leads."""


@pytest.mark.parametrize("guest", GUESTS)
def test_each_guest_has_its_devices(guest):
    """A guest gets the initrd, disks, channels and network card that its kind expects."""
    prepared = Prepared(options=options(guest), files=FILES, driver=SimpleNamespace(arch="aarch64"))
    spec = boot.vm_spec(prepared, SOCKETS, Path("/l/console.log"))
    channels = {channel.name: channel.vsock_port for channel in spec.channels}
    assert (spec.initrd, [disk.name for disk in spec.disks], channels, spec.network_socket) == DEVICES[guest]


PORTS = {
    "bare": (["pick 22"], None),
    "ovm": (["pick 22", "socket podman.sock to port 58125", "pick 58125"], 58125),
    "ovm-core": (["pick 22", "socket podman.sock to /run/podman/podman.sock with /k/ovm"], None),
}


@pytest.mark.parametrize("guest", GUESTS)
async def test_each_guest_has_its_ports(guest):
    """Before the boot, sshd's port is open, and podman's where there is a podman, by the way that its kind knows."""
    noted, recall = Recorder(), SimpleNamespace(ssh_port=None, podman_port=None)
    _, podman_port = await boot._open_ports(noted, SOCKETS, options(guest), recall)
    assert (noted.asked, podman_port) == PORTS[guest]


async def test_podmans_tcp_port_is_optional():
    """Without ``podman_tcp`` podman has its socket alone, in either kind of guest."""
    noted, recall = Recorder(), SimpleNamespace(ssh_port=None, podman_port=None)
    assert (await boot._open_ports(noted, SOCKETS, options("ovm", podman_tcp=False), recall))[1] is None
    assert "pick 58125" not in noted.asked
    async with session_of("ovm-core", noted, podman_tcp=False) as session:
        await session.attach()
        assert session.podman_port is None


ATTACHED = {
    "ovm": ["serve announcements", "ping", "connect", "close"],
    "ovm-core": ["connect", "ping", "connect", "forward to /run/podman/podman.sock", "close"],
}


@pytest.mark.parametrize("guest", ATTACHED)
async def test_each_guest_is_attached(guest):
    """Podman answers and ssh is connected; of the seed's guests sshd is waited for first, and podman's port led on."""
    noted = Recorder()
    async with session_of(guest, noted) as session:
        await session.attach()
        await session.attach()  # after a reboot: a port that is open is not opened twice
    first = noted.asked[: len(ATTACHED[guest]) - 1]
    assert [*first, noted.asked[-1]] == ATTACHED[guest]
    assert noted.asked.count("forward to /run/podman/podman.sock") == (guest == "ovm-core")
    assert session.podman_port == {"ovm": None, "ovm-core": 58125 + 7}[guest]


async def test_a_tunnel_of_the_last_boot_is_waited_for(monkeypatch):
    """Podman's socket may refuse at first, while gvproxy renews its connection to the guest, and answer then."""
    monkeypatch.setattr(running, "REACH_AGAIN_S", 0)
    refusals = iter(["ReadError"] * 3)
    async with session_of("ovm-core", Recorder()) as session:

        async def ping() -> None:
            if refusal := next(refusals, None):
                raise GuestError(f"podman does not answer: {refusal}")

        session.ping = ping
        await session.attach()
    assert next(refusals, None) is None


async def test_a_podman_that_refuses_for_good_is_not_waited_for_for_ever(monkeypatch):
    """The error is podman's own after PING_TIMEOUT_S, not that the machine is not ready."""
    monkeypatch.setattr(running, "PING_TIMEOUT_S", 0)
    monkeypatch.setattr(running, "REACH_AGAIN_S", 0)
    async with session_of("ovm-core", Recorder()) as session:

        async def ping() -> None:
            raise GuestError("podman does not answer: ReadError")

        session.ping = ping
        with pytest.raises(ExceptionGroup) as caught:
            await session.attach()
    assert "ReadError" in str(first_error(caught.value))


SETTLED = {"ovm": ["exec /usr/lib/ovm/attached", "sync", "kick chrony"], "ovm-core": ["sync", "kick chrony"]}


@pytest.mark.parametrize("guest", SETTLED)
async def test_each_guest_is_settled(guest):
    """The clock is set, and only a guest that has our programs is told that it may start its containers."""
    noted = Recorder()
    async with session_of(guest, noted) as session:
        noted.asked = []
        await session.settle()
        assert noted.asked == SETTLED[guest]


@pytest.mark.parametrize(("guest", "known", "told"), [("ovm", 1, ["exec nft"]), ("ovm", 2222, []), ("ovm-core", 1, [])])
async def test_the_firewall_is_told_of_another_port(guest, known, told):
    """A resumed guest with a firewall of ours is told of sshd's port on the host, if that is another one now."""
    noted = Recorder()
    async with session_of(guest, noted) as session:
        noted.asked = []
        await session.reach_again(known_ssh_port=known)
        assert sorted(noted.asked) == sorted(["connect", "ping", "sync", *told])


ORDERS = {"bare": [], "ovm": ["exec systemctl"], "ovm-core": ["exec systemctl"]}


@pytest.mark.parametrize("guest", GUESTS)
async def test_each_guest_is_told_to_power_off(guest, monkeypatch):
    """A guest with an sshd is told over ssh first; each hears its power button then."""
    monkeypatch.setattr(shutdown, "POWER_BUTTON_AFTER_S", 0)
    monkeypatch.setattr(shutdown, "POWER_BUTTON_RETRY_S", 0)
    noted, force = Recorder(), asyncio.Event()
    async with session_of(guest, noted) as session:
        noted.asked = []
        await shutdown._ask_to_power_off(session, shutdown.Shutdown(tell=str, force_wanted=force))
        assert noted.asked == ["resume", *ORDERS[guest], *["button"] * shutdown.POWER_BUTTON_TRIES]
    assert force.is_set()


def machine_in(tmp_path: Path, guest: str) -> Options:
    """Options of a machine that has been made, with an initrd beside its directories."""
    directories = {name: tmp_path / name for name in ("target_dir", "socket_dir", "log_dir", "ssh_key_dir")}
    for directory in directories.values():
        directory.mkdir()
    make_keys(KeyPaths(directories["ssh_key_dir"]))
    data.save_machine(TargetPaths(directories["target_dir"]), data.Machine(machine_id="0" * 32))
    (tmp_path / "initrd").write_bytes(b"070701")
    return options(guest, **directories, data_disk_mib=1024)


def told(given: Options) -> AbstractAsyncContextManager[None]:
    """A boot's instructions, of which nobody is told when they are asked for."""
    initrd = given.target_dir.parent / "initrd"
    profile = PROFILES[given.guest]
    return profile.told(given, initrd, channel_key="word", blocked_ports=(2222,), asked=lambda: None)


@pytest.mark.parametrize("guest", ["bare", "ovm"])
async def test_instructions_are_behind_the_initrd(guest, tmp_path):
    """A boot configuration lies behind the image's initrd, with the ports to block and the key to the channel."""
    given = machine_in(tmp_path, guest)
    async with told(given):
        content = SocketPaths(given.socket_dir).boot_initrd.read_bytes()
    assert content.startswith(b"070701")
    assert b"word" in content
    assert b"2222" in content
    assert not TargetPaths(given.target_dir).scratch_disk.exists()


async def test_the_seeds_guest_asks_for_its_instructions(short_path):
    """It gets a command and an empty scratch disk, and no initrd is written for it."""
    given = machine_in(short_path, "ovm-core")
    scratch = TargetPaths(given.target_dir).scratch_disk
    scratch.write_bytes(b"of the last boot")
    async with told(given):
        reader, writer = await asyncio.open_unix_connection(SocketPaths(given.socket_dir).command)
        assert b"key word" in await reader.read(COMMAND_MAX_BYTES)
        writer.close()
    assert scratch.stat().st_size == 1 << 30
    assert scratch.stat().st_blocks == 0
    assert not SocketPaths(given.socket_dir).boot_initrd.exists()


async def test_the_seeds_guest_is_kept_from_a_disk_it_would_format(short_path):
    """A data disk that was in use and has lost its file system is an error, and the guest is told nothing."""
    given = machine_in(short_path, "ovm-core")
    target = TargetPaths(given.target_dir)
    data.save_machine(target, data.Machine(machine_id="0" * 32, data_ever_ready=True))
    target.data_disk.write_bytes(bytes(1 << 17))
    with pytest.raises(FileError, match="would format it"):
        async with told(given):
            raise AssertionError("a boot was allowed")
    assert not SocketPaths(given.socket_dir).command.exists()


@pytest.mark.parametrize(
    ("guest", "wire", "reads"), [("bare", "vfkit", []), ("ovm", "vfkit", []), ("ovm-core", "channel", ["ovm"])]
)
def test_each_guest_reaches_gvproxy(guest, wire, reads):
    """By its hypervisor's card; the seed's guest by a channel, and then gvproxy reads the user's key for its tunnel."""
    profile = PROFILES[guest]
    assert profile.wire("vfkit") == wire
    assert [path.name for path in profile.gvproxy_reads(KeyPaths(Path("/k")))] == reads
