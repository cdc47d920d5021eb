"""The blocking twin of the API: its names, and the loop that waits for it."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import ovm
import ovm.sync
from ovm.errors import StateError
from ovm.guest.ssh import SSH
from ovm.sync.loop import Loop, Stream
from ovm.sync.process import Process

ROOT = Path(__file__).parents[2]
SCRIPT_DEADLINE_S = 60

OTHER_NAMES = {"aclose": "close"}
OTHER_RESULTS = {
    "AsyncIterator[Event]": "Iterator[Event]",
    "AsyncIterator[asyncssh.SSHClientProcess[bytes]]": "Iterator[Process]",
}


def public(kind: type) -> dict[str, object]:
    return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}


def test_the_twins_are_what_the_script_writes():
    """Who changes the asynchronous machines runs scripts/sync.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "sync.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    """And is the very same but for what waits."""
    assert ovm.sync.__all__ == [name for name in ovm.__all__ if name != "__version__"]
    others = {name for name in ovm.sync.__all__ if getattr(ovm.sync, name) is not getattr(ovm, name)}
    assert others == {"create_ovm", "create_linux_ovm", "create_darwin_ovm", "connect", "OVM", "RemoteOVM"}
    with pytest.raises(AttributeError):
        _ = ovm.sync.Loop  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["create_ovm", "create_linux_ovm", "create_darwin_ovm", "connect"])
def test_functions_take_the_same(name):
    theirs, ours = inspect.signature(getattr(ovm, name)), inspect.signature(getattr(ovm.sync, name))
    assert str(theirs) == str(ours)
    assert not inspect.iscoroutinefunction(getattr(ovm.sync, name))


@pytest.mark.parametrize("name", ["OVM", "RemoteOVM"])
def test_machines_have_the_same(name):
    """Each method with the same parameters and result, each property a property."""
    theirs, ours = public(getattr(ovm, name)), public(getattr(ovm.sync, name))
    attributes = {"options"} if name == "OVM" else {"name", "service_version"}
    assert set(ours) == {OTHER_NAMES.get(told, told) for told in theirs} | attributes
    for told, member in theirs.items():
        twin = ours[OTHER_NAMES.get(told, told)]
        assert isinstance(twin, property) is isinstance(member, property), told
        assert inspect.getdoc(twin), told
        if not isinstance(member, property):
            assert isinstance(member, Callable)
            assert isinstance(twin, Callable)
            wanted, has = inspect.signature(member), inspect.signature(twin)
            assert list(has.parameters.values()) == list(wanted.parameters.values()), told
            assert has.return_annotation == OTHER_RESULTS.get(wanted.return_annotation, wanted.return_annotation), told
            assert not inspect.iscoroutinefunction(twin), told


def test_importing_is_cheap():
    """Nothing heavy, and no thread, before a machine is asked for."""
    heavy = {"asyncssh", "httpx2", "msgspec", "asyncio"}
    code = f"import sys, ovm.sync, threading; print(*({heavy} & sys.modules.keys()), threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


# The loop


async def _add(one: int, two: int = 0) -> int:
    await asyncio.sleep(0)
    return one + two


async def _fail() -> None:
    raise ovm.PortError("taken", hint="another")


def test_there_is_one_for_all_threads():
    found: set[Loop] = set()
    threads = [threading.Thread(target=lambda: found.add(Loop.current())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {Loop.current()}


def test_results_and_errors_come_back():
    loop = Loop.current()
    assert loop.run(_add, 1, two=2) == 3
    assert loop.call(max, 1, 2) == 2
    with pytest.raises(ovm.PortError, match="taken"):
        loop.run(_fail)
    with pytest.raises(TypeError):
        loop.run(_add)  # type: ignore[call-arg]


def test_ctrl_c_cancels_what_is_waited_for():
    """It is over, cleaning up included, before the exception arrives."""
    done: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            done.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        Loop.current().run(work)
    assert done == ["cleaned up"]


def test_ctrl_c_loses_no_event():
    queue: asyncio.Queue[str] = asyncio.Queue()

    class Queued(AsyncIterator[str]):
        async def __anext__(self) -> str:
            if queue.empty():
                os.kill(os.getpid(), signal.SIGINT)
            return await queue.get()

    stream = Stream(Loop.current(), Queued())
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    Loop.current().call(queue.put_nowait, "told")
    assert next(stream) == "told"


def test_its_own_thread_cannot_wait_for_it():
    """A progress callback that would stand still for ever is told so instead."""
    loop = Loop.current()
    with pytest.raises(StateError, match="callback"):
        loop.call(loop.run, _add, 1)


def test_listeners_may_wait_for_it(caplog):
    """They are called one after the other in a thread of their own, plain ones and others; one that fails is logged."""
    loop = Loop.current()
    heard: list[int] = []
    all_heard = threading.Event()

    def plain(number: int) -> None:
        heard.append(loop.run(_add, number, 1))

    async def not_plain(number: int) -> None:
        heard.append(number)
        all_heard.set()

    def failing() -> None:
        raise ValueError("of a listener")

    loop.call(loop.elsewhere(plain), 1)
    loop.call(loop.elsewhere(failing))
    loop.call(loop.elsewhere(not_plain), 3)
    assert all_heard.wait(10)
    assert heard == [2, 3]
    assert "of a listener" in caplog.text


def in_a_fork(what: Callable[[], str]) -> str:
    """What a forked child comes to say."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writing, what().encode())
        except BaseException as error:  # noqa: BLE001 - told to the test
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        answer = told.read()
    os.waitpid(pid, 0)
    return answer


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_is_refused():
    """And may have a loop of its own."""
    loop = Loop.current()
    answer = in_a_fork(lambda: str(loop.run(_add, 1)))
    assert answer.startswith(
        f"StateError: this machine belongs to process {os.getpid()}, and this process is a fork of it"
    )
    assert in_a_fork(lambda: str(Loop.current().run(_add, 1))) == "1"
    assert loop.run(_add, 1) == 1


AT_EXIT = """
import asyncio, atexit, sys, threading
from ovm.errors import StateError
from ovm.sync.loop import Loop, Stream

loop = Loop.current()

def say(what):
    sys.stdout.write(f"{what}" + chr(10))

async def machine():
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.to_thread(say, "shut down in a thread")

class Never:
    async def __anext__(self):
        await asyncio.Event().wait()

def listen():
    say(f"events: {list(Stream(loop, Never()))}")

async def begin():
    global task
    task = asyncio.create_task(machine())
    await asyncio.sleep(0)

def late():
    for _ in range(2):
        try:
            Loop.current().run(begin)
        except StateError as error:
            say(error)

atexit.register(late)
threading.Thread(target=listen).start()
loop.run(begin)
"""


@pytest.mark.parametrize(("end", "status"), [("", 0), ("sys.exit(3)", 3), ("raise ValueError('mine')", 1)])
def test_the_interpreters_exit_ends_it(end, status):
    """Tasks clean up, in threads too; iterators end; who comes later is told."""
    argv = [sys.executable, "-W", "error", "-c", AT_EXIT + end]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=SCRIPT_DEADLINE_S)
    late = "this was cancelled, because the interpreter is exiting"
    assert done.returncode == status, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(["events: []", "shut down in a thread", late, late])
    assert done.stderr == "" or "ValueError: mine" in done.stderr


# Commands in the guest


async def test_a_process_and_its_streams(sshd):
    """It is talked to line by line, signalled, and ended on the way out."""

    def talk() -> None:
        loop = Loop.current()
        ssh = loop.call(SSH, sshd.port, sshd.keys)
        try:
            with loop.within(
                ssh.process(["sh", "-c", "while read -r x; do echo got $x; done; echo end >&2; exit 3"])
            ) as p:
                process = Process(loop, p)
                process.stdin.write(b"one\n")
                assert process.stdout.readline() == b"got one\n"
                assert process.returncode is None
                process.stdin.write(b"two\nthree\n")
                process.stdin.close()
                assert list(process.stdout) == [b"got two\n", b"got three\n"]
                assert process.stderr.read() == b"end\n"
                assert process.wait() == process.returncode == 3
            with loop.within(ssh.process(["sleep", "1000"])) as p:
                process = Process(loop, p)
                process.terminate()
                assert process.wait() == -signal.SIGTERM
            with pytest.raises(ValueError, match="mine"), loop.within(ssh.process(["sleep", "1000"])) as p:
                raise ValueError("mine")
            assert p.is_closing()
        finally:
            loop.run(ssh.close)

    async with asyncio.timeout(60):
        await asyncio.to_thread(talk)
