"""Sleep and wake by IOKit, from a C library with its signatures: tests/doubles/iokit."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ctypes.util
import enum
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from ovm import power
from ovm.power import macos
from ovm.power.macos import Libraries
from power import PATIENCE_S, Told, fail, hang, turns, until

SOURCE = Path(__file__).parents[1] / "doubles" / "iokit" / "iokit.c"
ROOT, NOTIFIER = 0x80001234, 0xF00D0001


class Message(enum.IntEnum):
    """From IOMessage.h, where each is the subsystem's number, err_system(0x38), and one of its own."""

    CAN_SLEEP = 0x38 << 26 | 0x270
    WILL_SLEEP = 0x38 << 26 | 0x280
    WILL_NOT_SLEEP = 0x38 << 26 | 0x290
    HAS_POWERED_ON = 0x38 << 26 | 0x300
    WILL_POWER_ON = 0x38 << 26 | 0x320


ANSWER = "IOAllowPowerChange"
THREAD = "ovm: sleep and wake"
IDS = [1, 0x1_0000_0002, 0x7FFF_FFFF_FFFF_FFFF, -0x8000_0000_0000_0000, -2]
"""Of notifications: a C intptr_t, beyond 32 bits, and with the top bit set."""


class Record(NamedTuple):
    name: str
    first: int
    second: int
    thread: int


class _Record(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
        ("thread", ctypes.c_size_t),
    ]


class Double:
    """The library, and what it was asked."""

    def __init__(self, path: Path) -> None:
        self.libraries = Libraries(str(path), str(path))
        self.c = ctypes.CDLL(str(path))
        self.c.double_post.argtypes = [ctypes.c_uint32, ctypes.c_int64]
        self.c.double_records.argtypes = [ctypes.POINTER(_Record)]
        self.c.double_gate.argtypes = [ctypes.c_char_p]
        self.c.double_reset()
        self._gates: list[ctypes.Array[ctypes.c_char]] = []

    def records(self) -> list[Record]:
        into = (_Record * 4096)()
        return [Record(r.name.decode(), r.first, r.second, r.thread) for r in into[: self.c.double_records(into)]]

    def names(self) -> list[str]:
        return [record.name for record in self.records()]

    def answers(self) -> list[tuple[int, int]]:
        return [(r.first, ctypes.c_int64(r.second).value) for r in self.records() if r.name == ANSWER]

    def post(self, message: int, notification: int = 0) -> None:
        self.c.double_post(message, notification)

    async def say(self, message: int, notification: int = 0) -> None:
        """Until the callback has returned, and what it told the event loop is done."""
        before = self.names().count("returned")
        self.post(message, notification)
        await until(lambda: self.names().count("returned") > before)
        await turns()

    def gate(self, name: str) -> None:
        self._gates.append(ctypes.create_string_buffer(name.encode()))
        self.c.double_gate(self._gates[-1])


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("iokit") / "iokit.so"
    argv = [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", path, SOURCE]
    built = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return path


@pytest.fixture
def double(library) -> Double:
    """The library; afterwards nothing of it is left, and nothing was used in a wrong way."""
    double = Double(library)
    yield double
    double.gate("")
    assert [name for name in double.names() if name.startswith("misuse")] == []
    assert double.c.double_left() == 0
    assert THREAD not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
async def told():
    """One who is told of everything."""
    told = Told()
    yield told
    await told.edges.close()


@contextlib.asynccontextmanager
async def watching(double, told):
    """While IOKit is listened to; the run loop runs."""
    async with begun(double, told) as watch:
        await until(lambda: "CFRunLoopRun" in double.names())
        yield watch


@contextlib.asynccontextmanager
async def begun(double, told):
    """From the moment the thread is started."""
    async with begun_with(double.libraries, told) as watch:
        yield watch


@contextlib.asynccontextmanager
async def begun_with(libraries, told):
    watch = asyncio.create_task(macos.watch(told.edges, libraries=libraries))
    await asyncio.sleep(0)
    try:
        yield watch
    finally:
        watch.cancel()
        await asyncio.wait({watch})


@pytest.mark.parametrize("notification", IDS)
async def test_pause_first_then_the_answer(double, told, notification):
    """And the answer carries the id that was asked with, whole."""
    answers_before = []

    async def pause() -> None:
        await asyncio.sleep(0.01)
        answers_before.extend(double.answers())

    told.on_sleep = pause
    async with watching(double, told):
        await double.say(Message.WILL_SLEEP, notification)
        assert told.words == ["sleep"]
        assert answers_before == []
        assert double.answers() == [(ROOT, notification)]


async def test_a_whole_night(double, told):
    """The messages of a sleep in their order; those that want no answer get none."""
    async with watching(double, told):
        await double.say(Message.CAN_SLEEP, 5)
        assert told.words == []
        await double.say(Message.WILL_SLEEP, 6)
        await double.say(Message.WILL_POWER_ON, 7)
        assert told.words == ["sleep"]
        await double.say(Message.HAS_POWERED_ON, 8)
        assert told.words == ["sleep", "wake"]
        assert double.answers() == [(ROOT, 5), (ROOT, 6)]


async def test_a_sleep_that_is_called_off(double, told):
    """The guest runs again; one that was never paused is left alone."""
    async with watching(double, told):
        await double.say(Message.CAN_SLEEP, 1)
        await double.say(Message.WILL_NOT_SLEEP, 2)
        assert told.words == []
        await double.say(Message.WILL_SLEEP, 3)
        await double.say(Message.WILL_NOT_SLEEP, 4)
        assert told.words == ["sleep", "wake"]
        assert double.answers() == [(ROOT, 1), (ROOT, 3)]


async def test_the_same_edge_twice(double, told):
    """Passed on once, and answered each time."""
    async with watching(double, told):
        for message, notification in ((Message.WILL_SLEEP, 1), (Message.WILL_SLEEP, 2)):
            await double.say(message, notification)
        await double.say(Message.HAS_POWERED_ON)
        await double.say(Message.HAS_POWERED_ON)
        assert told.words == ["sleep", "wake"]
        assert double.answers() == [(ROOT, 1), (ROOT, 2)]


async def test_a_wake_without_a_sleep(double, told):
    """Is a wake."""
    async with watching(double, told):
        await double.say(Message.HAS_POWERED_ON)
        assert told.words == ["wake"]


async def test_messages_nobody_knows(double, told):
    """Are neither passed on nor answered, and hurt nothing."""
    async with watching(double, told):
        for message in (0, 0xE0000310, 0xFFFFFFFF):
            await double.say(message, 1)
        assert double.answers() == []
        await double.say(Message.WILL_SLEEP, 2)
        assert told.words == ["sleep"]


async def test_a_pause_that_hangs(double, told, monkeypatch):
    """The answer is given all the same, and the callback cancelled."""
    monkeypatch.setattr(macos, "SLEEP_LIMIT_S", 0.02)
    told.on_sleep = hang
    async with watching(double, told):
        await double.say(Message.WILL_SLEEP, 9)
        assert double.answers() == [(ROOT, 9)]
        await until(lambda: told.words == ["sleep", "sleep cancelled"])


async def test_a_pause_that_fails(double, told, caplog):
    """The answer is given all the same, and the failure logged."""
    told.on_sleep = fail
    async with watching(double, told):
        await double.say(Message.WILL_SLEEP, 9)
        assert double.answers() == [(ROOT, 9)]
        assert "it went wrong" in caplog.text


@pytest.mark.parametrize("kind", [ValueError, asyncio.CancelledError])
async def test_an_exception_in_the_callback_itself(double, told, monkeypatch, caplog, kind):
    """It never leaves the callback, and the next message is heard."""

    async def sleep(_limit_s: float) -> None:
        raise kind("inside")

    with monkeypatch.context() as broken:
        broken.setattr(told.edges, "sleep", sleep)
        async with watching(double, told):
            await double.say(Message.WILL_SLEEP, 9)
            assert double.answers() == [(ROOT, 9)]
            broken.undo()
            await double.say(Message.WILL_SLEEP, 10)
            assert double.answers() == [(ROOT, 9), (ROOT, 10)]
            assert told.words == ["sleep"]
    assert ("inside" in caplog.text) == (kind is ValueError)


async def test_an_answer_that_is_refused(double, told, caplog):
    """Nothing more can be done than to say so."""
    double.c.double_allow_fails(-536870212)  # kIOReturnError
    async with watching(double, told):
        await double.say(Message.WILL_SLEEP, 9)
    assert "0xe00002bc" in caplog.text


async def test_a_busy_event_loop(double, told, monkeypatch, caplog):
    """It cannot pause in time, so the host sleeps all the same, and no late pause follows."""
    monkeypatch.setattr(macos, "SLEEP_LIMIT_S", 0.02)
    monkeypatch.setattr(macos, "LOOP_S", 0.02)
    async with watching(double, told):
        double.post(Message.WILL_SLEEP, 9)
        deadline = time.monotonic() + PATIENCE_S
        while "returned" not in double.names() and time.monotonic() < deadline:
            time.sleep(0.001)  # the event loop stands still
        assert double.answers() == [(ROOT, 9)]
        await turns()
        assert told.words == []
    assert "did not answer" in caplog.text


def test_an_event_loop_that_has_ended(double):
    """The host sleeps, and nobody is told; the thread can still be stopped."""
    with asyncio.Runner() as runner:

        async def listener() -> macos._Listener:
            return macos._Listener(Told().edges, double.libraries)

        listening = runner.run(listener())
        thread = threading.Thread(target=listening.run, name=THREAD)
        thread.start()
    for message in (Message.WILL_SLEEP, Message.HAS_POWERED_ON, Message.CAN_SLEEP):
        double.post(message, int(message))
    deadline = time.monotonic() + PATIENCE_S
    while double.names().count("returned") < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    listening.stop()
    thread.join(PATIENCE_S)
    assert double.answers() == [(ROOT, int(m)) for m in (Message.WILL_SLEEP, Message.CAN_SLEEP)]


def test_the_end_of_the_event_loop_ends_the_thread(double):
    """asyncio.run cancels everything, and waits for us; nobody had to stop anything."""
    told = []

    async def main() -> None:
        told.append(Told())
        watch = asyncio.create_task(macos.watch(told[0].edges, libraries=double.libraries))
        await until(lambda: "CFRunLoopRun" in double.names())
        assert not watch.done()

    asyncio.run(main())
    assert double.names()[-1] == "CFRelease"


async def test_stopped_while_the_host_waits_for_us(double, told):
    """The answer is given at once, not after the limit."""
    told.on_sleep = hang
    async with watching(double, told):
        double.post(Message.WILL_SLEEP, 9)
        await until(lambda: told.words == ["sleep"])
    assert double.answers() == [(ROOT, 9)]
    assert told.words == ["sleep", "sleep cancelled"]


@pytest.mark.parametrize(
    "moment",
    [
        "CFRunLoopGetCurrent",
        "CFRunLoopSourceCreate",
        "CFRunLoopAddSource",
        "IORegisterForSystemPower",
        "IONotificationPortGetRunLoopSource",
        "CFRunLoopRun",
    ],
)
async def test_stopped_at_each_moment_of_the_start(double, told, moment):
    """A stop is never lost, least of all one that comes just before the run loop runs."""
    double.gate(moment)
    async with begun(double, told) as watch:
        await until(lambda: double.c.double_at_gate() == 1)
        watch.cancel()
        await turns()
        double.gate("")
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait({watch})
    assert double.names()[-1] == "CFRelease"


async def test_stopped_at_once(double, told):
    """Before the thread has done anything, many times."""
    for _ in range(20):
        async with begun(double, told):
            pass
    assert told.words == []


async def test_released_in_the_right_order(double, told):
    """Deregistered, closed, destroyed, all by the thread that listened, which has ended."""
    async with watching(double, told):
        pass
    names = double.names()
    released = [
        "CFRunLoopSourceSignal",
        "CFRunLoopWakeUp",
        "CFRunLoopStop",
        "run loop ended",
        "CFRunLoopRemoveSource",
        "IODeregisterForSystemPower",
        "IOServiceClose",
        "IONotificationPortDestroy",
        "CFRunLoopSourceInvalidate",
        "CFRelease",
    ]
    assert names[names.index("CFRunLoopSourceSignal") :] == released


async def test_the_run_loops_thread_is_its_own(double, told):
    """Only the stop comes from the event loop's thread; the callback runs in the run loop's."""
    async with watching(double, told):
        await double.say(Message.WILL_SLEEP, 1)
    ours = threading.get_ident()
    from_us = {r.name for r in double.records() if r.thread == ours}
    assert from_us == {"CFRunLoopSourceSignal", "CFRunLoopWakeUp"}
    assert len({r.thread for r in double.records()}) == 2


async def test_the_arguments_of_release(double, told):
    """What was got at registration is given back."""
    async with watching(double, told):
        pass
    given = {r.name: r.first for r in double.records()}
    assert (given["IODeregisterForSystemPower"], given["IOServiceClose"]) == (NOTIFIER, ROOT)


async def test_a_refused_registration(double, told, caplog):
    """The watch goes on without, and can be ended."""
    caplog.set_level("INFO")
    double.c.double_refuse_registration()
    async with begun(double, told) as watch:
        await until(lambda: double.names()[-1:] == ["CFRelease"])
        assert not watch.done()
    assert "IOKit does not report sleep" in caplog.text
    assert "CFRunLoopRun" not in double.names()


@pytest.mark.parametrize("library", ["/nowhere/IOKit", str(SOURCE), None])
async def test_no_iokit(told, caplog, library):
    """Missing, no library at all, or one without the functions: said once, and nothing is raised."""
    caplog.set_level("INFO")
    path = library or ctypes.util.find_library("c") or "libc.so.6"
    async with begun_with(Libraries(path, path), told) as watch:
        await until(lambda: "no IOKit;" in caplog.text)
        assert not watch.done()
    assert THREAD not in [thread.name for thread in threading.enumerate()]


async def test_the_whole_watch(double, monkeypatch):
    """As on a Mac: from the message to the two callbacks and back."""
    told = Told()
    monkeypatch.setattr(power, "_system", lambda edges: macos.watch(edges, libraries=double.libraries))
    async with power.watch(told.sleep, told.wake):
        await until(lambda: "CFRunLoopRun" in double.names())
        await double.say(Message.WILL_SLEEP, 1)
        await double.say(Message.HAS_POWERED_ON, 2)
        await until(lambda: told.words == ["sleep", "wake"])
    assert double.answers() == [(ROOT, 1)]


@pytest.mark.skipif(sys.platform != "darwin", reason="there is no IOKit here")
async def test_the_real_iokit(told, caplog):
    """It can be registered with and left again."""
    caplog.set_level("INFO")
    watch = asyncio.create_task(macos.watch(told.edges))
    await asyncio.sleep(0.1)
    watch.cancel()
    await asyncio.wait({watch})
    assert caplog.text == ""
