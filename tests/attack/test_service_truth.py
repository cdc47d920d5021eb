"""Rows B12, B15, B16, B17 and B18: what is said of a service that ends, is killed, hangs, or is not the service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ovm
import processes
import puppets
import soak
from ovm.errors import GuestError, StartError, StateError, StopError
from ovm.process import identity
from ovm.registry import machines
from ovm.service import client, launch
from ovm.wire import plain
from ovm.wire.error import WireError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a puppet's service is looked at in /proc")


async def why(stage: puppets.Stage) -> str:
    """What ``ovm status`` says."""
    return str(json.loads((await stage.run("status", "dev", "--json")).out)["why"])


async def test_a_failed_run_is_told_as_one_at_once(stage: puppets.Stage) -> None:
    """B15: whoever learns that a start failed finds in the next status why."""
    stage.order("fail-start")
    for _ in range(soak.times(20)):
        done = await stage.run("start", "dev")
        assert (done.status, "the puppet fell" in done.err) == (1, True), done
        assert await why(stage) == "stopped (failed): the puppet fell"


async def test_how_it_ended_is_written_before_its_socket_closes(stage: puppets.Stage) -> None:
    """B15: nobody can be refused by the socket and find no record, or an old one."""
    stage.order("fail-start")
    await stage.run("start", "dev")
    stage.revoke("fail-start")
    await stage.up()
    path = stage.machine.service_socket
    stopping = await stage.begin("stop", "dev")

    def is_refused() -> bool:
        with socket.socket(socket.AF_UNIX) as looking:
            return looking.connect_ex(str(path)) != 0

    await stage.until(is_refused)
    ended = machines.at_rest(stage.machine).last
    assert ended is not None
    assert ended.reason == "stopped"
    await stage.end_of(stopping)


async def test_a_flaw_of_the_service_is_no_kill(stage: puppets.Stage) -> None:
    """B16: an error that nobody expected is recorded as what it failed of."""
    stage.order("break-start")
    done = await stage.run("start", "dev")
    assert done.status == 1
    assert "ZeroDivisionError: a flaw" in done.err
    assert "ZeroDivisionError: a flaw" in await why(stage)


async def test_an_end_that_cannot_be_recorded_is_no_crash(stage: puppets.Stage) -> None:
    """B16: nor is it passed over, or told by an old record."""
    (stage.machine.ended_record / "in the way").mkdir(parents=True)
    await stage.up()
    assert (await stage.run("stop", "dev")).status == 0
    assert not stage.is_held()
    assert await why(stage) == "stopped: the end of its last run could not be recorded; see: ovm logs dev service"
    assert "cannot record how dev ended" in stage.log()
    listed = json.loads((await stage.run("ls", "--json")).out)
    assert listed[0]["state"] == "stopped"


async def test_a_directory_that_cannot_be_written_is_named(
    stage: puppets.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B16: where not even the service's own record could be taken away, a kill is not claimed."""
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone = int(process.stdout)
    record = {"pid": gone, "started": 1, "program": "python", "version": "1", "started_at": 1.0, "socket_dir": "/"}
    stage.machine.service_record.write_text(json.dumps(record | {"boot_id": identity.boot()}))
    assert machines.at_rest(stage.machine).why == f"its service (process {gone}) was killed"
    monkeypatch.setattr(os, "access", lambda path, mode: path != stage.machine.directory or mode != os.W_OK)
    told = f"its service (process {gone}) left no record of its end: {stage.machine.directory} cannot be written to"
    assert machines.at_rest(stage.machine).why == told


async def test_one_that_never_ran_is_told_apart(stage: puppets.Stage) -> None:
    """B16."""
    assert await why(stage) == "stopped: it was never started"


async def test_a_start_that_could_not_listen_is_recorded(stage: puppets.Stage) -> None:
    """B15: of a service that failed before it held a machine, too; a login starts it, and nobody sees its error."""
    stage.machine.service_socket.mkdir(parents=True)
    done = await stage.run("start", "dev")
    assert done.status == 1
    stage.machine.service_socket.rmdir()
    assert (await why(stage)).startswith("stopped (failed): ")


# B17


@contextlib.contextmanager
def answering(path: Path, answer: Callable[[socket.socket], object], *, once: bool = False) -> Iterator[None]:
    """Something that accepts, and has ``answer`` say what it says; ``once`` it is gone afterwards."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    accepted: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                accepted.append(connection)
                threading.Thread(target=say, args=(connection,), daemon=True).start()

    def say(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.recv(100_000)
            if once:
                server.shutdown(socket.SHUT_RDWR)
                server.close()
            answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        for open_one in (server, *accepted):
            with contextlib.suppress(OSError):
                open_one.shutdown(socket.SHUT_RDWR)
            open_one.close()
        thread.join()
        path.unlink(missing_ok=True)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
SHORT = {
    "length": HEAD + b'content-length: 1000\r\n\r\n{"name": "dev"',
    "nothing": HEAD + b"content-length: 1000\r\n\r\n",
    "chunk": HEAD + b'transfer-encoding: chunked\r\n\r\n100\r\n{"name": "dev"',
    "between chunks": HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\n{}\n\r\n",
    "head": HEAD,
}


def cut_off(answer: bytes) -> Callable[[socket.socket], object]:
    def say(connection: socket.socket) -> None:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_RDWR)

    return say


@pytest.mark.parametrize("answer", SHORT.values(), ids=SHORT)
async def test_an_answer_that_breaks_off_is_not_taken_for_whole(short_path: Path, answer: bytes) -> None:
    """B17: by neither client; and it is said that the service ended."""
    path = short_path / "run" / "ovm.sock"
    with (
        answering(path, cut_off(answer), once=True),
        pytest.raises(StateError, match="not running: its service ended before its answer"),
    ):
        await asyncio.to_thread(client.Service("dev", path).ports)
    with (
        answering(path, cut_off(answer), once=True),
        pytest.raises(StateError, match="not running: its service ended before its answer"),
    ):
        await remotely(path)


async def remotely(path: Path) -> object:
    from ovm.service import remote
    from ovm.wire import http

    status = client.p.Status(
        name="dev", state="", step="", started_at=0.0, pid=1, version="", api=1, health=None, restart_needed=[]
    )
    async with http.connect(path) as api, contextlib.AsyncExitStack() as stack:
        return await remote.RemoteOVM("dev", path, api, stack, status).ports()


@pytest.mark.parametrize("cut", ["chunk", "between chunks"])
async def test_events_that_break_off_are_no_end(short_path: Path, cut: str) -> None:
    """B17: a stream of events that ends is told apart from one that was cut."""
    path = short_path / "run" / "ovm.sock"
    with (
        answering(path, cut_off(SHORT[cut]), once=True),
        pytest.raises(StateError, match="ended before its answer was complete"),
    ):
        await asyncio.to_thread(lambda: list(client.Service("dev", path).events()))
    whole = HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\n{}\n\r\n0\r\n\r\n"
    with answering(path, cut_off(whole), once=True):
        assert await asyncio.to_thread(lambda: list(client.Service("dev", path).events())) == []


async def test_a_service_killed_while_it_answers(stage: puppets.Stage) -> None:
    """B17: a command that waits for it says so, and the next status what became of it."""
    await stage.up()
    pid = stage.pid
    following = await stage.begin("events", "-f", "dev")
    stage.order("hold-stop")
    stopping = await stage.begin("stop", "dev")
    await stage.reached("hold-stop")
    stage.kill()
    for process in (following, stopping):
        done = await stage.end_of(process)
        assert done.status == 1
        assert "unexpected" not in done.err
        assert "dev is not running" in done.err
    assert "ended before its answer was complete" in done.err
    assert await why(stage) == f"stopped (crashed): its service (process {pid}) was killed"


async def test_listeners_elsewhere_learn_of_a_kill(stage: puppets.Stage) -> None:
    """B17: by an error and a close; they would wait for ever."""
    await stage.up()
    async with await ovm.connect("dev") as machine:
        events = machine.events()
        await stage.until(lambda: machine._listening is not None)
        await asyncio.to_thread(stage.kill)
        async with asyncio.timeout(puppets.DEADLINE_S):
            heard = [await anext(events) for _ in range(2)]
        assert [event.name for event in heard] == ["error", "close"]
        assert isinstance(heard[0].error, StateError)


# B18


async def test_a_start_waits_for_a_slow_stop(stage: puppets.Stage) -> None:
    """B18: and starts it then; the ready of the run that ends is not taken for its own."""
    await stage.up()
    first = stage.pid
    stage.order("hold-stop")
    stopping = await stage.begin("stop", "dev")
    await stage.reached("hold-stop")
    starting = await stage.begin("start", "dev")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(starting.wait(), 1.0)
    stage.revoke("hold-stop")
    done = await stage.end_of(starting)
    assert done.status == 0, done
    assert (await stage.end_of(stopping)).status == 0
    assert stage.pid != first
    assert stage.service.status().state is ovm.VMState.RUNNING


@pytest.mark.parametrize("change", ["suspend", "reset"])
async def test_a_start_waits_for_what_goes_on(stage: puppets.Stage, change: str) -> None:
    """B18: a suspend ends first, a reset comes up again first."""
    await stage.up()
    order = "hold-stop" if change == "suspend" else "hold-reset"
    stage.order(order)
    changing = await stage.begin(change, "dev")
    await stage.reached(order)
    starting = await stage.begin("start", "dev")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(starting.wait(), 1.0)
    stage.revoke(order)
    done = await stage.end_of(starting)
    assert done.status == 0, done
    assert (await stage.end_of(changing)).status == 0
    assert stage.service.status().state is ovm.VMState.RUNNING


async def test_a_stop_during_a_start(stage: puppets.Stage) -> None:
    """B18: the start says that it was given up."""
    stage.order("hold-start")
    starting = await stage.begin("start", "dev")
    await stage.reached("hold-start")
    assert (await stage.run("stop", "--force", "dev")).status == 0
    done = await stage.end_of(starting)
    assert (done.status, "stopped before it was ready" in done.err) == (1, True), done


async def test_two_restarts_at_once(stage: puppets.Stage) -> None:
    """B18: the machine runs afterwards, and what each says is true."""
    await stage.up()
    both = [await stage.end_of(process) for process in [await stage.begin("restart", "dev") for _ in range(2)]]
    assert stage.service.status().state is ovm.VMState.RUNNING
    for done in both:
        assert done.status == 0 or "stopped before it was ready" in done.err, done


async def test_a_start_of_a_machine_with_a_long_history(stage: puppets.Stage) -> None:
    """B18: whose ready was so long ago that nobody remembers it."""
    await stage.up()
    for _ in range(510):
        await asyncio.to_thread(stage.service.pause)
        await asyncio.to_thread(stage.service.resume)
    stage.service.status()
    assert (await asyncio.wait_for(stage.run("start", "dev"), 20)).status == 0


async def test_a_service_killed_during_a_start(stage: puppets.Stage) -> None:
    """B17: the start says what happened."""
    stage.order("hold-start")
    starting = await stage.begin("start", "dev")
    await stage.reached("hold-start")
    stage.kill()
    done = await stage.end_of(starting)
    assert done.status == 1
    assert "the service of dev ended before the machine was ready" in done.err


# B12


def drips(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


def says_nothing(connection: socket.socket) -> None:
    connection.recv(1)


def drips_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    number = 0
    while number < 90:
        connection.sendall(b"x%d: y\r\n" % number)
        number += 1
        time.sleep(0.05)


def drips_body(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"content-length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.02)


NONSENSE = {
    "silence": says_nothing,
    "drips": drips,
    "headers": drips_headers,
    "body": drips_body,
    "nonsense": cut_off(b"\x1b[2J nonsense\r\n\r\n"),
}


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
def test_every_request_has_a_deadline(short_path: Path, answer: Callable[[socket.socket], object]) -> None:
    """B12: one in all, however little a peer sends at a time."""
    path = short_path / "run" / "ovm.sock"
    with answering(path, answer):
        began = time.monotonic()
        with contextlib.suppress(WireError), plain.request(path, "GET", "/", timeout_s=0.15) as answered:
            answered.read()
        assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
async def test_a_guest_in_the_services_place_stops_no_stop(
    stage: puppets.Stage, monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket], object]
) -> None:
    """B12: a stop says within its deadline what helps, and that does help."""
    monkeypatch.setattr(client, "ANSWER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(client, "ENDING_S", 0.1)
    await stage.up()
    pid = stage.pid
    with answering(stage.machine.service_socket, answer):
        with pytest.raises(GuestError) as raised:
            await asyncio.to_thread(stop_by_command)
        assert "ovm stop --force dev" in raised.value.hint
        await asyncio.to_thread(stop_by_command, force=True)
    await stage.until(lambda: processes.command(pid) in {"", processes.GONE})
    assert not stage.is_held()
    assert await why(stage) == "stopped"


async def test_a_service_that_is_not_understood_is_stopped_by_a_signal(stage: puppets.Stage) -> None:
    """B12: the guest is shut down, whatever version of ovm, or guest, answers in the service's place."""
    await stage.up()
    pid = stage.pid
    with answering(stage.machine.service_socket, cut_off(HEAD + b"content-length: 2\r\n\r\n[]")):
        done = await stage.run("stop", "dev")
    assert (done.status, "stopping it with a signal" in done.err) == (0, True), done
    await stage.until(lambda: processes.command(pid) in {"", processes.GONE})
    assert await why(stage) == "stopped"


def stop_by_command(*, force: bool = False) -> None:
    from ovm.cli import Ui
    from ovm.cli.stop import stop

    stop(Ui(progress="none"), "dev", force=force)


async def test_a_stopped_service_is_killed(stage: puppets.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """B12: one that hears no signal but that one."""
    from ovm.service import holder

    monkeypatch.setattr(client, "ANSWER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(holder, "OBEYS_S", 0.3)
    await stage.up()
    pid = stage.pid
    processes.freeze(pid)
    await asyncio.to_thread(stop_by_command, force=True)
    await stage.until(lambda: processes.command(pid) in {"", processes.GONE})
    assert machines.at_rest(stage.machine).held_by == "nobody"


async def test_a_record_that_names_another_process(stage: puppets.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """B12: that process is not touched, however well the record describes it; nor is a pid that was given anew."""
    from ovm.service import holder

    monkeypatch.setattr(client, "ANSWER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(holder, "OBEYS_S", 0.3)
    await stage.up()
    real = json.loads(stage.machine.service_record.read_text())
    processes.freeze(real["pid"])
    innocent = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        there = identity.of(innocent.pid)
        assert there is not None
        named = real | {"pid": there.pid, "started": there.started, "program": there.program}
        for told in (named, real | {"started": real["started"] + 1}, real | {"boot_id": "another"}, {}, []):
            stage.machine.service_record.write_text(json.dumps(told))
            with pytest.raises(StopError, match="which process"):
                holder.end(stage.machine)
        assert innocent.returncode is None
        assert identity.is_there(there)
        assert stage.is_held()
        stage.machine.service_record.write_text(json.dumps(real))
        holder.end(stage.machine)
        assert not stage.is_held()
    finally:
        innocent.kill()
        await innocent.wait()


async def test_a_guest_that_says_it_has_stopped(stage: puppets.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """B12: it is not believed: the lock says whether the service is there."""
    from ovm.cli import stop

    monkeypatch.setattr(stop, "FORCED_GONE_S", 0.3)
    await stage.up()
    status = json.loads((await stage.run("status", "dev", "--json")).out)

    def lies(connection: socket.socket) -> None:
        body = json.dumps(status).encode()
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body))

    with answering(stage.machine.service_socket, lies):
        await asyncio.to_thread(stop_by_command, force=True)
    assert not stage.is_held()


async def test_a_service_killed_at_any_moment(stage: puppets.Stage) -> None:
    """B15 to B18: whatever a command says of it is true, and the next start comes up."""
    chance = soak.random("service kills")
    for _ in range(soak.times(30)):
        change = chance.choice(["start", "stop", "suspend", "reset"])
        if change != "start":
            await stage.up()
        before = identity.of(stage.pid) if change != "start" else None
        changing = await stage.begin(change, "dev")
        await asyncio.sleep(chance.uniform(0, 0.8))
        killed = None
        with contextlib.suppress(OSError, ValueError, KeyError):
            pid = stage.pid
            if before is None or pid == before.pid:
                os.kill(pid, signal.SIGKILL)
                killed = pid
        done = await stage.end_of(changing)
        assert "Traceback" not in done.err
        assert "unexpected" not in done.err, done
        status = await stage.run("status", "dev")
        told = status.out + status.err
        if killed is None or not machines.at_rest(stage.machine).why:
            assert told.startswith(("dev is running", "dev is stopped")), told
        else:
            assert told == f"dev is stopped (crashed): its service (process {killed}) was killed\n"
        listed = json.loads((await stage.run("ls", "--json")).out)
        assert listed[0]["state"] in {"running", "stopped", "crashed"}, listed
        await stage.up()
        assert (await stage.run("stop", "--force", "dev")).status == 0


async def test_shared_machines_wait_for_a_stop(stage: puppets.Stage) -> None:
    """B18: a test run that finds the machine on its way down starts it."""
    from ovm.testing import sharing

    await stage.up()
    first = stage.pid
    stage.order("hold-stop")
    stopping = await stage.begin("stop", "dev")
    await stage.reached("hold-stop")

    def share() -> int:
        with sharing.sharing("dev", template="dev", keep=False, stop=True):
            return stage.pid

    using = asyncio.create_task(asyncio.to_thread(share))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(using), 0.5)
    stage.revoke("hold-stop")
    assert await using != first
    assert not stage.is_held()
    await stage.end_of(stopping)


async def test_a_start_that_is_given_up_says_so(stage: puppets.Stage) -> None:
    """B18: in the library's words, too."""
    stage.order("hold-start")
    starting = asyncio.create_task(asyncio.to_thread(launch.up, stage.machine, lambda _step: None))
    await stage.reached("hold-start")
    await asyncio.to_thread(stage.service.stop, force=True)
    with pytest.raises(StartError, match="stopped before it was ready"):
        await starting
