"""Sleep and wake by logind: a real D-Bus daemon of the test's own, and python-dbusmock's logind on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import threading
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ovm import power
from ovm.power import linux
from ovm.power.linux import LOGIND, MANAGER, PATH, SIGNAL
from power import PATIENCE_S, Told, fail, hang, turns, until

if sys.platform != "linux":
    pytest.skip("there is no logind here", allow_module_level=True)

from dbus_fast import Message, MessageType, Variant
from dbus_fast.aio import MessageBus

PYTHON = "/usr/bin/python3"
"""Debian's own, which has python3-dbusmock."""
MOCK = "org.freedesktop.DBus.Mock"
BUS = "org.freedesktop.DBus"
CONFIG = """
<busconfig>
  <type>custom</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""


@contextlib.asynccontextmanager
async def dbus_daemon(directory: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A bus of its own; gives its address."""
    program = shutil.which("dbus-daemon")
    if program is None:
        pytest.skip("dbus-daemon is not installed")
    config = directory / "bus.conf"
    config.write_text(CONFIG.format(path=directory / "bus"))
    argv = [program, f"--config-file={config}", "--nofork", "--print-address=1"]
    process = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=PIPE)
    try:
        address = (await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)).decode().strip()
        assert address
        yield address, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def logind_on(address: str) -> AsyncIterator[Logind]:
    """python-dbusmock's logind on that bus."""
    probe = await asyncio.create_subprocess_exec(PYTHON, "-c", "import dbusmock", stderr=DEVNULL)
    if await probe.wait() != 0:
        pytest.skip("python3-dbusmock is not installed")
    mock = await asyncio.create_subprocess_exec(
        *(PYTHON, "-m", "dbusmock", "--system", "--template", "logind"),
        env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": address},
        stdin=DEVNULL,
        stdout=DEVNULL,
    )
    try:
        async with client(address) as bus:
            logind = Logind(bus)
            await logind.started()
            yield logind
    finally:
        with contextlib.suppress(ProcessLookupError):
            mock.terminate()
        await mock.wait()


@contextlib.asynccontextmanager
async def client(address: str) -> AsyncIterator[MessageBus]:
    bus = await MessageBus(address).connect()
    try:
        yield bus
    finally:
        if bus.connected:
            bus.disconnect()
        with contextlib.suppress(EOFError, OSError):
            await asyncio.wait_for(bus.wait_for_disconnect(), PATIENCE_S)


class Logind:
    """What the test makes logind do."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus

    async def call(self, destination, path, interface, member, signature="", *body):
        reply = await asyncio.wait_for(
            self.bus.call(Message(destination, path, interface, member, signature=signature, body=list(body))),
            PATIENCE_S,
        )
        return reply.body if reply.message_type is MessageType.METHOD_RETURN else None

    async def started(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.call(LOGIND, PATH, MANAGER, "CanSuspend") is None:
                await asyncio.sleep(0.01)

    async def inhibitors(self) -> list[list]:
        """Those it holds open: the mock drops one at the end of file, so ours must really be closed."""
        [held] = await self.call(LOGIND, PATH, MANAGER, "ListInhibitors")
        return held

    async def holds(self, count: int) -> None:
        """Until there are so many inhibitors."""
        async with asyncio.timeout(PATIENCE_S):
            while len(await self.inhibitors()) != count:
                await asyncio.sleep(0.002)

    async def tell(self, sleep: bool, destination: str = "") -> None:
        arguments = [MANAGER, SIGNAL, "b", [Variant("b", sleep)]]
        await self.call(LOGIND, PATH, MOCK, "EmitSignal", "sssav", *arguments)

    async def waits_for(self, seconds: float) -> None:
        """Its InhibitDelayMaxSec; for ever the same on this bus."""
        added = await self.call(
            LOGIND, PATH, MOCK, "AddProperty", "ssv", MANAGER, "InhibitDelayMaxUSec", Variant("t", int(seconds * 1e6))
        )
        assert added is not None


@pytest.fixture(scope="module")
async def address(tmp_path_factory) -> AsyncIterator[str]:
    """A bus for all tests of this file."""
    async with dbus_daemon(tmp_path_factory.mktemp("dbus")) as (address, _):
        yield address


@pytest.fixture(scope="module")
async def shared_logind(address) -> AsyncIterator[Logind]:
    async with logind_on(address) as logind:
        yield logind


@pytest.fixture
async def logind(shared_logind) -> AsyncIterator[Logind]:
    """Nobody inhibits anything, before and after."""
    await shared_logind.holds(0)
    yield shared_logind
    await shared_logind.holds(0)


@pytest.fixture
async def told():
    """One who is told of everything."""
    told = Told()
    yield told
    await told.edges.close()


@contextlib.asynccontextmanager
async def watching(address, told):
    watch = asyncio.create_task(linux.watch(told.edges, bus_address=address))
    try:
        yield watch
    finally:
        watch.cancel()
        await asyncio.wait({watch})


async def test_a_whole_night(address, logind, told):
    """Inhibitor taken, let go after the pause and not before, taken again; then the wake."""
    go_on = asyncio.Event()
    told.on_sleep = go_on.wait
    async with watching(address, told):
        await logind.holds(1)
        [[what, _who, _why, mode, *_]] = await logind.inhibitors()
        assert (what, mode) == ("sleep", "delay")
        for _ in range(2):
            go_on.clear()
            told.words.clear()
            await logind.tell(sleep=True)
            await until(lambda: told.words == ["sleep"])
            assert len(await logind.inhibitors()) == 1
            go_on.set()
            await logind.holds(0)
            await logind.tell(sleep=False)
            await until(lambda: told.words == ["sleep", "wake"])
            assert len(await logind.inhibitors()) == 1


async def test_a_pause_that_fails(address, logind, told, caplog):
    """The sleep goes on."""
    told.on_sleep = fail
    async with watching(address, told):
        await logind.holds(1)
        await logind.tell(sleep=True)
        await logind.holds(0)
    assert "it went wrong" in caplog.text


async def test_the_same_edge_twice(address, logind, told):
    """Passed on once, and never more than one inhibitor."""
    async with watching(address, told):
        await logind.holds(1)
        for sleep in (True, True, False, False):
            await logind.tell(sleep)
        await until(lambda: told.words == ["sleep", "wake"])
        await logind.holds(1)
        await logind.tell(sleep=True)
        await until(lambda: told.words == ["sleep", "wake", "sleep"])


async def test_a_wake_without_a_sleep(address, logind, told):
    """Is a wake."""
    async with watching(address, told):
        await logind.holds(1)
        await logind.tell(sleep=False)
        await until(lambda: told.words == ["wake"])


async def test_ended_while_the_host_waits_for_us(address, logind, told):
    """The inhibitor goes at once."""
    told.on_sleep = hang
    async with watching(address, told):
        await logind.holds(1)
        await logind.tell(sleep=True)
        await until(lambda: told.words == ["sleep"])
    await logind.holds(0)
    assert told.words == ["sleep", "sleep cancelled"]


async def test_anybody_may_send_a_signal_and_is_not_believed(address, logind, told):
    """It comes to us whatever we asked for, if it is sent to us by name."""
    async with watching(address, told):
        await logind.holds(1)
        [names] = await logind.call(BUS, "/org/freedesktop/DBus", BUS, "ListNames")
        others = {name for name in names if name.startswith(":")} - {logind.bus.unique_name}
        for name in others:
            signal = Message(name, PATH, MANAGER, SIGNAL, message_type=MessageType.SIGNAL, signature="b", body=[True])
            await logind.bus.send(signal)
        await logind.tell(sleep=False)  # which is heard after them
        await until(lambda: told.words != [])
        assert told.words == ["wake"]


async def test_files_that_nobody_asked_for_are_closed(address, logind, told):
    """Or anybody on the bus could fill our table of open files."""
    async with watching(address, told), client_with_files(address) as sender:
        await logind.holds(1)
        [names] = await logind.call(BUS, "/org/freedesktop/DBus", BUS, "ListNames")
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                for name in names:
                    if name.startswith(":") and name not in {sender.unique_name, logind.bus.unique_name}:
                        signal = Message(
                            *(name, PATH, MANAGER, "Other"),
                            message_type=MessageType.SIGNAL,
                            signature="h",
                            body=[0],
                            unix_fds=[theirs.fileno()],
                        )
                        await sender.send(signal)
            ours.setblocking(False)
            end = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 1), PATIENCE_S)
            assert end == b""


@contextlib.asynccontextmanager
async def client_with_files(address):
    bus = await MessageBus(address, negotiate_unix_fd=True).connect()
    try:
        yield bus
    finally:
        bus.disconnect()
        await asyncio.wait_for(bus.wait_for_disconnect(), PATIENCE_S)


def open_files() -> set[int]:
    return {int(fd.name) for fd in Path("/proc/self/fd").iterdir() if fd.exists()}


async def test_the_inhibitor_is_not_inherited(address, logind, told):
    """A program started meanwhile would hold up every sleep."""
    before = open_files()
    async with watching(address, told):
        await until(lambda: len(open_files() - before) == 2)  # the connection, the inhibitor
        assert not any(os.get_inheritable(fd) for fd in open_files() - before)


@pytest.mark.parametrize("turn", range(0, 15, 2))
async def test_cancelled_while_connecting(address, logind, told, turn):
    """No connection stays behind."""
    before = open_files()
    async with watching(address, told):
        await turns(turn)
    assert open_files() == before


@pytest.mark.parametrize("call", ["AddMatch", "Get", "Inhibit", "GetNameOwner"])
async def test_cancelled_while_a_call_is_on_its_way(address, logind, told, call, monkeypatch):
    """No connection stays behind and no inhibitor, whenever logind comes to answer."""
    before, real = open_files(), linux._Logind._call
    sent = asyncio.Event()

    async def watched_call(self, *arguments):
        if arguments[3] == call:
            sent.set()
        return await real(self, *arguments)

    monkeypatch.setattr(linux._Logind, "_call", watched_call)
    async with watching(address, told):
        await asyncio.wait_for(sent.wait(), PATIENCE_S)
    assert open_files() == before
    await logind.holds(0)


async def test_cancelled_when_the_inhibitor_has_just_come(address, logind, told, monkeypatch):
    """The caller never sees the answer, and yet the file in it is closed."""
    before, real = open_files(), linux._Logind._arrived

    def arrived(self, message):
        real(self, message)
        if message.unix_fds:
            watches[0].cancel()

    monkeypatch.setattr(linux._Logind, "_arrived", arrived)
    watches = []
    async with watching(address, told) as watch:
        watches.append(watch)
        await asyncio.wait({watch}, timeout=PATIENCE_S)
        assert watch.cancelled()
    assert open_files() == before
    await logind.holds(0)


async def test_a_file_that_comes_too_late_is_closed(address):
    """Nobody would close it any more."""
    reader, writer = os.pipe()
    async with client(address) as bus:
        logind = linux._Logind(bus)
        logind.over = True
        answer = Message(
            message_type=MessageType.METHOD_RETURN, reply_serial=1, signature="h", body=[0], unix_fds=[writer]
        )
        logind._arrived(answer)
    with os.fdopen(reader, "rb") as end:
        os.set_blocking(reader, False)
        assert end.read() == b""


async def test_the_whole_watch(address, logind, monkeypatch):
    """As a machine uses it, by the address in the environment."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    told = Told()
    async with power.watch(told.sleep, told.wake):
        await logind.holds(1)
        await logind.tell(sleep=True)
        await logind.holds(0)
        await logind.tell(sleep=False)
        await until(lambda: told.words == ["sleep", "wake"])
    await logind.holds(0)


async def test_the_end_of_the_event_loop(address, logind):
    """asyncio.run cancels everything, and the inhibitor goes with it."""
    taken = threading.Event()

    async def other_loop() -> None:
        watch = asyncio.create_task(linux.watch(Told().edges, bus_address=address))
        await asyncio.to_thread(taken.wait, PATIENCE_S)
        assert not watch.done()

    ending = asyncio.create_task(asyncio.to_thread(asyncio.run, other_loop()))
    await logind.holds(1)
    taken.set()
    await ending
    await logind.holds(0)


async def test_logind_waits_no_longer_than_it_is_set_to(address, logind, told, caplog):
    """A pause that hangs is given most of that time. Last but for one of this logind: it keeps the setting."""
    await logind.waits_for(0.1)
    told.on_sleep = hang
    async with watching(address, told):
        await logind.holds(1)
        await logind.tell(sleep=True)
        await logind.holds(0)
    assert "within 0.1 s" in caplog.text
    assert told.words == ["sleep", "sleep cancelled"]


async def test_a_logind_that_inhibits_nothing(address, logind, told):
    """Sleep cannot be delayed then, but is heard of. Last of this logind: it does not inhibit any more."""
    refused = 'raise dbus.exceptions.DBusException("no", name="org.freedesktop.login1.OperationInProgress")'
    await logind.call(LOGIND, PATH, MOCK, "AddMethod", "sssss", MANAGER, "Inhibit", "ssss", "h", refused)
    async with watching(address, told):
        while told.words == []:
            await logind.tell(sleep=True)
            await asyncio.sleep(0.01)
        await logind.tell(sleep=False)
        await until(lambda: told.words == ["sleep", "wake"])
        assert await logind.inhibitors() == []


async def test_a_bus_without_logind(short_path, told, caplog):
    """Said once, and that is all."""
    caplog.set_level("INFO")
    async with dbus_daemon(short_path) as (address, _):
        await asyncio.wait_for(linux.watch(told.edges, bus_address=address), PATIENCE_S)
    assert "no logind;" in caplog.text
    assert told.words == []


@pytest.mark.parametrize("address", ["unix:path=/nowhere/bus", "nonsense", "carrier-pigeon:x=1"])
async def test_no_bus(address, told, caplog):
    """Said once, and that is all."""
    caplog.set_level("INFO")
    await asyncio.wait_for(linux.watch(told.edges, bus_address=address), PATIENCE_S)
    assert "no logind;" in caplog.text


async def test_a_bus_that_says_nothing(short_path, told, caplog, monkeypatch):
    """It is given up after a while."""
    caplog.set_level("INFO")
    monkeypatch.setattr(linux, "CALL_S", 0.02)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(short_path / "bus"))
        silent.listen()
        address = f"unix:path={short_path / 'bus'}"
        await asyncio.wait_for(linux.watch(told.edges, bus_address=address), PATIENCE_S)
    assert "no logind;" in caplog.text


async def test_a_bus_that_dies_and_comes_back(short_path, told, monkeypatch):
    """A guest that was paused runs again, for nobody would tell of the wake; then logind is heard again."""
    monkeypatch.setattr(linux, "RECONNECT_S", 0.02)
    async with contextlib.AsyncExitStack() as stack:
        async with dbus_daemon(short_path) as (address, daemon):
            async with logind_on(address) as logind:
                watch = await stack.enter_async_context(watching(address, told))
                await logind.holds(1)
                await logind.tell(sleep=True)
                await logind.holds(0)
                daemon.kill()
                await until(lambda: told.words == ["sleep", "wake"])
        assert not watch.done()
        (short_path / "bus").unlink()
        async with dbus_daemon(short_path) as (address, _), logind_on(address) as logind:
            while len(told.words) < 3:  # the mock has its name before it has its methods
                await logind.tell(sleep=True)
                await asyncio.sleep(0.01)
            await logind.tell(sleep=False)
            await logind.holds(1)
            await until(lambda: told.words == ["sleep", "wake", "sleep", "wake"])
