"""B8 and B9: somebody in the guest floods the ports on which the manager listens to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

import soak
from ovm.guest import boot_channel, ovm_core, port_publisher, sparing
from ovm.guest.port_publisher import PEER, Publisher
from ovm.guest.sparing import Sparing

EXPOSE = b"POST /services/forwarder/expose HTTP/1.1\r\nHost: gateway.containers.internal\r\n"
ORDER = json.dumps({"local": ":8080", "protocol": "tcp"}).encode()
WHOLE = EXPOSE + b"Content-Length: %d\r\n\r\n" % len(ORDER) + ORDER
HALF = EXPOSE + b'Content-Length: 1000\r\n\r\n{"local": '
PODMAN_S = 5.0
TASKS_MAX = 40
"""Of the manager, beside those that were there before the flood."""


class Guest:
    """A guest in which the connections from the ports in ``podman`` are podman's."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.podman: set[str] = set()
        self.sessions = 0
        self.sessions_most = 0
        self.opened = 0

    async def serve(self, process) -> None:
        """The guest's commands: who is at a port, and echo."""
        self.sessions += 1
        self.sessions_most = max(self.sessions_most, self.sessions)
        program, *words = process.command.split()
        status = 0
        if program == PEER:
            status = int(not self.podman.issuperset(words))
            words = ["podman" if word in self.podman else f"sh (pid {word})" for word in words]
        process.stdout.write("\n".join(words).encode() + b"\n")
        process.exit(status)
        self.sessions -= 1

    async def decide(self, *_: object) -> None:
        self.opened += 1

    @contextlib.asynccontextmanager
    async def connection(self, sent: bytes, *, podman: bool = False) -> AsyncIterator[asyncio.StreamReader]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        if podman:
            self.podman.add(str(writer.get_extra_info("sockname")[1]))
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            writer.write(sent)
            yield reader


def is_managers(task: asyncio.Task[object]) -> bool:
    """Whether it is for an announcement."""
    return "Publisher" in repr(task.get_coro())


@pytest.fixture
async def guest(sshd, ssh, unused_port, monkeypatch) -> Guest:
    """A guest whose announcements are served."""
    monkeypatch.setattr(port_publisher, "LISTEN_PORT", unused_port)
    guest = Guest(unused_port)
    sshd.serve = guest.serve
    Publisher(ssh, guest.decide)
    await ssh.connect()
    return guest


@pytest.mark.soak
@pytest.mark.parametrize(("sent", "full"), [(WHOLE, 1000), (HALF, 3000)], ids=["requests", "half bodies"])
async def test_a_flood_of_announcements_keeps_nobody_waiting(guest, ssh, sent, full):
    """B8: in a flood podman is served, commands run, few tasks are there, and whoever floods gets one refusal each."""
    most = 0

    async def flood() -> bytes:
        nonlocal most
        async with guest.connection(sent) as reader:
            answer = await reader.read()
            most = max(most, len([task for task in asyncio.all_tasks() if is_managers(task)]))
            return answer

    async def podman() -> bytes:
        async with guest.connection(WHOLE, podman=True) as reader:
            return await reader.read()

    count = soak.times(full)
    async with asyncio.TaskGroup() as tasks:
        floods = [tasks.create_task(flood()) for _ in range(count // 2)]
        announced = tasks.create_task(podman())
        floods += [tasks.create_task(flood()) for _ in range(count // 2)]
        async with asyncio.timeout(PODMAN_S):
            said = await ssh.exec(["echo", "still", "here"], timeout_s=PODMAN_S)
            assert said.text.split() == ["still", "here"]
            assert (await announced).startswith(b"HTTP/1.1 200 ")
        answers = await asyncio.gather(*floods)
    assert guest.opened == 1
    assert all(answer.startswith(b"HTTP/1.1 403 ") for answer in answers)
    assert most <= TASKS_MAX
    assert guest.sessions_most <= 3


async def test_more_than_may_wait_are_closed_at_once(guest, sshd, monkeypatch):
    """B8: beyond WAITING_MAX a connection is closed without a question, and podman is served once the others are."""
    monkeypatch.setattr(port_publisher, "WAITING_MAX", 5)
    may_answer = asyncio.Event()

    async def late(process) -> None:
        await may_answer.wait()
        await guest.serve(process)

    sshd.serve = late
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PODMAN_S):
        readers = [await stack.enter_async_context(guest.connection(HALF)) for _ in range(8)]
        reading = [asyncio.create_task(reader.read()) for reader in readers]
        while sum(task.done() for task in reading) < 3:
            await asyncio.sleep(0)
        assert [task.result() for task in reading if task.done()] == [b""] * 3
        may_answer.set()
        said = await asyncio.gather(*reading)
        assert sum(answer.startswith(b"HTTP/1.1 403 ") for answer in said) == 5
        reader = await stack.enter_async_context(guest.connection(WHOLE, podman=True))
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")


def test_a_flood_of_warnings_is_counted(monkeypatch):
    """B9: of one kind so many lines are logged in a while; then how many were left out."""
    now = 1000.0
    monkeypatch.setattr(sparing.time, "monotonic", lambda: now)
    told: list[str] = []
    tell = Sparing(told.append, "noise")
    for number in range(100_000):
        tell(f"line {number}")
    assert told[: sparing.LINES_MAX] == [f"line {number}" for number in range(sparing.LINES_MAX)]
    assert told[sparing.LINES_MAX :] == ["noise: further ones within 60 s are counted, not logged"]
    now += sparing.PERIOD_S
    tell("later")
    assert told[sparing.LINES_MAX + 1 :] == ["later", f"noise: {100_000 - sparing.LINES_MAX} were not logged"]


async def test_a_flood_of_the_ready_port_is_slowed_down(short_path, monkeypatch):
    """B9: whoever floods the ready port is read slowly and logged sparingly, and what follows is understood."""
    monkeypatch.setattr(boot_channel, "LINE_PAUSE_S", 0.0)
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(boot_channel.asyncio, "sleep", counted)
    warned: list[str] = []
    lines = soak.times(100_000)
    async with boot_channel.listen(short_path / "s", warned.append, lambda: None) as channel, asyncio.timeout(20):
        _, writer = await asyncio.open_unix_connection(short_path / "s")
        with contextlib.closing(writer):
            writer.write(b"warn flood\n" * lines + b"ready 1\n")
            await writer.drain()
            await channel.wait()
    assert len(warned) <= sparing.LINES_MAX + 2
    assert len(pauses) >= lines - boot_channel.LINES_AT_ONCE


async def test_idle_connections_do_not_keep_root_from_the_ready_port(short_path):
    """B9: connections without the key give way to newer ones, and their number is bounded."""
    async with (
        boot_channel.listen(short_path / "s", print, lambda: None, key="k") as channel,
        contextlib.AsyncExitStack() as stack,
        asyncio.timeout(5),
    ):
        for _ in range(10 * boot_channel.CONNECTIONS_MAX):
            _, writer = await asyncio.open_unix_connection(short_path / "s")
            stack.enter_context(contextlib.closing(writer))
        _, writer = await asyncio.open_unix_connection(short_path / "s")
        stack.enter_context(contextlib.closing(writer))
        writer.write(b"key k\nready 1\n")
        await channel.wait()
        while len(channel.tasks) > boot_channel.CONNECTIONS_MAX:
            await asyncio.sleep(0)


async def test_more_connections_than_that_get_no_command(short_path):
    """B8: whoever opens the command's port again and again costs no more than SENDING_MAX tasks."""
    async with (
        ovm_core.serve(short_path / "s", b"words", lambda: None),
        contextlib.AsyncExitStack() as stack,
        asyncio.timeout(5),
    ):
        answers = []
        for _ in range(2 * ovm_core.SENDING_MAX):
            reader, writer = await asyncio.open_unix_connection(short_path / "s")
            stack.enter_context(contextlib.closing(writer))
            answers.append(await reader.read(5))
    assert answers == [b"words"] * ovm_core.SENDING_MAX + [b""] * ovm_core.SENDING_MAX
