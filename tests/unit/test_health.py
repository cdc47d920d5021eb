"""What a look at a machine finds, without a machine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from networks import started
from ovm.errors import GuestError, PortError
from ovm.machine import health
from ovm.machine.monitor import GIVEN_UP_AFTER, Monitor
from ovm.machine.profiles import PROFILES
from ovm.model.options import MIB, Options
from ovm.model.ports import Forward
from ovm.network import forwarding
from ovm.network import gvproxy as gvproxy_module
from ovm.network.host_ports import free_port
from ovm.paths import SocketPaths
from ovm.wire.error import WireError

GIB = 1024 * MIB
WELL = f"{8 * GIB} {4 * GIB} rw 0\n".encode()


@pytest.mark.parametrize(
    ("report", "problems"),
    [
        (WELL, []),
        (f"{8 * GIB} {4 * GIB} ro 0\n".encode(), ["read-only"]),
        (f"{8 * GIB} {4 * GIB} rw 3\n".encode(), ["counted 3 errors"]),
        (f"{8 * GIB} {255 * MIB} rw 0\n".encode(), ["almost full: 255 MiB"]),
        (f"{8 * GIB} 0 ro 7\n".encode(), ["read-only", "counted 7 errors", "almost full: 0 MiB"]),
        (b"0 0 rw 0\n", []),
    ],
)
def test_what_the_guest_reports(report, problems):
    """Each trouble of the data disk is a sentence."""
    found = health.parse(report)
    assert len(found.problems) == len(problems)
    assert all(words in problem for words, problem in zip(problems, found.problems, strict=True))
    assert found.ok == (not problems)


@pytest.mark.parametrize(
    "report", [b"", b"nonsense", b"1 2 rw", b"1 2 rw x", b"1 2 rw 0 0", b"\xff\xfe 1 rw 0", b"\n" + WELL]
)
def test_a_report_that_is_none(report):
    """Whatever else a guest says is told as such."""
    with pytest.raises(GuestError, match="is malformed"):
        health.parse(report)


def test_further_lines_are_problems():
    """Each line after the first is a problem in the guest's words, made printable, and no more than twenty count."""
    found = health.parse(b"1000000000 900000000 rw 0\ncontainer web is not started: port 80 is taken\nodd \x1b[31m\n")
    assert found.problems[0] == "container web is not started: port 80 is taken"
    assert found.problems[1].isprintable()
    assert len(health.parse(b"1000000000 900000000 rw 0\n" + b"line\n" * 100).problems) == 20


class Guest:
    """A session whose guest and podman answer as told."""

    def __init__(self, tmp_path, *, podman: Exception | None = None, guest: Exception | None = None, status: int = 0):
        names = ("gvproxy", "kernel", "initrd", "rootfs")
        self.options = Options.of(
            origin_path={name: f"/o/{name}" for name in names},
            versions=dict.fromkeys(names, "1"),
            **dict.fromkeys(("target_dir", "socket_dir", "log_dir", "ssh_key_dir"), tmp_path),
        )
        (tmp_path / "data.img").touch()
        self.profile = PROFILES["ovm"]
        self.podman, self.guest, self.status = podman, guest, status
        self.ssh = self

    async def ping(self, *, timeout_s: float) -> None:
        if self.podman:
            raise self.podman

    async def exec(self, _argv, *, timeout_s: float):
        if self.guest:
            raise self.guest
        return SimpleNamespace(exit_status=self.status, stdout=b"" if self.status else WELL)


async def test_a_machine_that_is_well(tmp_path):
    """Nothing is wrong, and all that can be known is."""
    look = await health.look(Guest(tmp_path))
    assert look.reachable
    assert look.health.ok
    assert look.health.data_size_bytes == 8 * GIB
    assert look.health.data_free_bytes == 4 * GIB
    assert look.health.host_free_bytes
    assert look.health.checked_at


async def test_each_way_in_has_its_own_trouble(tmp_path):
    """As long as one of them answers, the network is not to blame."""
    silent = GuestError("podman does not answer: …")
    deaf = GuestError("no ssh connection to the guest")
    assert (await health.look(Guest(tmp_path, podman=silent))).reachable
    look = await health.look(Guest(tmp_path, guest=deaf))
    assert look.reachable
    assert look.health.problems == (deaf.message,)
    look = await health.look(Guest(tmp_path, podman=silent, guest=deaf))
    assert not look.reachable
    assert look.health.problems == (silent.message, deaf.message)


async def test_an_older_guest_cannot_report(tmp_path):
    """Which is no trouble of the machine's."""
    look = await health.look(Guest(tmp_path, status=127))
    assert look.health.ok
    assert look.health.data_size_bytes is None


async def test_a_bug_is_not_taken_for_an_illness(tmp_path):
    """What is no error of ours goes up."""
    with pytest.raises(ZeroDivisionError):
        await health.look(Guest(tmp_path, guest=ZeroDivisionError()))


async def test_a_host_without_room_is_told(tmp_path, monkeypatch):
    """If the data disk may still grow, and only then."""
    guest = Guest(tmp_path)
    monkeypatch.setattr(health.os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_bavail=10, f_frsize=MIB))
    assert (await health.look(guest)).health.ok
    assert not await health.has_room(guest.options)
    with (tmp_path / "data.img").open("r+b") as disk:
        disk.truncate(GIB)
    (problem,) = (await health.look(guest)).health.problems
    assert "10 MiB left" in problem
    assert "1024 MiB more" in problem


async def test_a_data_disk_that_is_gone_is_told(tmp_path):
    """Somebody has removed it under the machine."""
    guest = Guest(tmp_path)
    (tmp_path / "data.img").unlink()
    (problem,) = (await health.look(guest)).health.problems
    assert "No such file" in problem


@pytest.fixture
async def monitor(group, gvproxy, short_path, tmp_path) -> AsyncIterator[Monitor]:
    """Looks, one after the other, at a machine that answers neither over ssh nor by way of podman."""
    guest: Any = Guest(tmp_path, podman=GuestError("podman is slow"), guest=GuestError("sshd is slow"))
    driver: Any = SimpleNamespace(can_replug=True)
    async with started(group, gvproxy, SocketPaths(short_path), tmp_path / "log", wire="qemu") as guest.network:
        yield Monitor(
            guest, driver, is_running=lambda: True, changed=lambda _: None, first_look_s=0.0, look_again_s=0.0
        )


async def test_a_gvproxy_that_answers_is_not_blamed(monitor, monkeypatch):
    """The gvproxy of a guest that has been too slow to answer for many looks runs on."""
    network, looks = monitor._session.network, asyncio.Queue()
    look = monitor.look
    monkeypatch.setattr(monitor, "look", lambda: looks.put_nowait(None) or look())
    looking = asyncio.create_task(monitor.keep_looking())
    for _ in range(2 * GIVEN_UP_AFTER + 2):
        await looks.get()
    looking.cancel()
    assert network.child.running


async def test_a_gvproxy_that_hangs_is_ended(monitor, monkeypatch):
    """A gvproxy whose API does not answer either is ended, so that another one takes its place."""
    monkeypatch.setattr(forwarding, "ANSWER_S", 0.05)
    monkeypatch.setattr(gvproxy_module, "END_GRACE_S", 0.05)
    child = monitor._session.network.child
    os.kill(child.pid, signal.SIGSTOP)
    looking = asyncio.create_task(monitor.keep_looking())
    async with asyncio.timeout(5):
        assert await child.process.wait() == -signal.SIGKILL
    looking.cancel()


async def test_a_new_gvproxy_is_not_blamed_for_the_last_one(monitor):
    """A gvproxy that dies while it is asked is not taken for hung: whoever heals would lose the next one."""
    await monitor._session.network.child.end(grace_s=0)
    assert not await monitor._gvproxy_hangs()


async def test_each_look_closes_what_could_not_be_closed(monitor, unused_port, monkeypatch):
    """A port that gvproxy did not close in time is closed at the next look."""
    network = monitor._session.network
    port = Forward(protocol="tcp", host_address="127.0.0.1", host_port=unused_port, guest_port=80)
    await network.expose(port)
    with monkeypatch.context() as deaf:
        deaf.setattr(network._api, "post", no_answer)
        with pytest.raises(PortError):
            await network.unexpose(port)
    looking = asyncio.create_task(monitor.keep_looking())
    async with asyncio.timeout(5):
        while network.forwards:
            await asyncio.sleep(0.01)
    looking.cancel()
    assert free_port("tcp", "127.0.0.1", unused_port) == unused_port


async def no_answer(_path: str, _body: object) -> None:
    raise WireError("no answer")
