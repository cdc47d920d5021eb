"""B2: the guest's words, by every way on which they reach a person, a log, JSON or an exception.

A table of ways times a table of hostile texts: a new way is one row.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import msgspec
import pytest
from asyncssh.constants import MSG_DISCONNECT
from asyncssh.packet import String, UInt32
from qemu.qmp import Message

import sshds
from ovm import __version__, cli
from ovm.cli import foreground, timeline
from ovm.cli import prune as cli_prune
from ovm.cli.progress import steps
from ovm.errors import GuestError, OVMError, from_dict
from ovm.guest import boot_channel
from ovm.guest.clock import Clock
from ovm.guest.ssh import SSH
from ovm.hypervisors import qemu_events, vfkit
from ovm.machine import boot, health, prune, shutdown
from ovm.machine.profiles import PROFILES
from ovm.machine.running import Session
from ovm.model.events import Event
from ovm.model.info import Health, Stage
from ovm.model.options import Options
from ovm.model.results import Pruned
from ovm.model.states import StateInfo, VMState
from ovm.paths import KeyPaths, SocketPaths
from ovm.process import probe
from ovm.registry import machines, records
from ovm.service import client, journal, protocol
from ovm.service.history import History
from ovm.wire import http, plain
from ovm.wire.error import WireError

FORGED = "2026-01-01 00:00:00,000 INFO ovm: forged"
HOSTILE = {
    "escapes": b"\x1b]0;owned\x07\x1b[2J\x1b[31m",
    "line ends": b"one\r\n" + FORGED.encode() + b"\nthree\rfour",
    "bidirectional marks": "\u202egnp.exe\u2066 \u200f".encode(),
    "C1 and other line ends": "\x9b31m \u2028" + FORGED + "\u2029\x85\x0b\x0c" + FORGED,
    "other controls": b"\0 \b\b\x7f \x1c",
    "invalid UTF-8": b"\xff\xfe\x80 \xc3( \xed\xa0\x80",
}
HOSTILE = {name: words if isinstance(words, bytes) else words.encode() for name, words in HOSTILE.items()}
TERMINAL_LINE = re.compile(r"[^\n]*")


def assert_fit(told: str) -> None:
    """Nothing in ``told`` moves a cursor, changes the order of letters, or begins a line as a record would."""
    for line in told.split("\n"):
        bad = [c for c in line if not (c.isprintable() or c == "\t")]
        assert not bad, (bad, line)
        assert not line.startswith(FORGED[:10]), line


@dataclass
class World:
    """Where the words begin, and what has come of them."""

    directory: Path
    keys: KeyPaths
    sshd: sshds.Sshd
    ssh: SSH
    words: bytes
    log: io.StringIO
    told: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The words where text is asked for; what is no UTF-8 is a lone surrogate or a replacement in Python."""
        return self.words.decode(errors="surrogateescape")

    @property
    def json_words(self) -> str:
        return self.words.decode(errors="replace")

    @contextlib.contextmanager
    def raises(self, kind: type[Exception], *, always: bool = True) -> Iterator[None]:
        """The error of that kind, as whoever catches it, logs it or lets it pass may see it."""
        try:
            yield
        except kind as error:
            log = logging.getLogger("ovm.test")
            log.warning("%s", error)
            self.told += [str(error), *traceback.format_exception(error)]
            if isinstance(error, OVMError):
                self.told.append(str(from_dict(json.loads(json.dumps(error.as_dict())))))
        else:
            assert not always, "nothing was raised"

    def session(self) -> Session:
        """A machine whose guest is the sshd, and whose podman is a socket."""
        names = ("gvproxy", "kernel", "initrd", "rootfs")
        directories = dict.fromkeys(("target_dir", "socket_dir", "log_dir", "ssh_key_dir"), self.directory)
        options = Options.of(
            origin_path={name: f"/o/{name}" for name in names}, versions=dict.fromkeys(names, "1"), **directories
        )
        (self.directory / "data.img").touch()
        nothing: Any = None
        return Session(
            options=options, network=nothing, vm=nothing, channel=nothing, ssh=self.ssh, clock=Clock(self.ssh),
            sockets=SocketPaths(self.directory), podman_port=None, guard=nothing, helpers_changed=lambda: None,
            console_log=self.directory / "console.log",
        )  # fmt: skip

    def answers(self, *, stdout: bytes = b"", stderr: bytes = b"", status: int = 0) -> None:
        """Let every command of the guest end so."""

        async def serve(process: asyncssh.SSHServerProcess[bytes]) -> None:
            process.stdout.write(stdout)
            process.stderr.write(stderr)
            process.exit(status)

        self.sshd.serve = serve

    def hangs_up(self) -> None:
        """Let the guest's sshd disconnect at the next command, with the words as its reason."""

        async def serve(process: asyncssh.SSHServerProcess[bytes]) -> None:
            disconnect(self.sshd.connections[-1], self.words)

        self.sshd.serve = serve

    @contextlib.asynccontextmanager
    async def podman(self, answer: bytes) -> AsyncIterator[Path]:
        """A podman that answers each request with these bytes and hangs up."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                await writer.drain()

        path = SocketPaths(self.directory).podman
        path.unlink(missing_ok=True)
        async with await asyncio.start_unix_server(serve, path):
            yield path


def disconnect(connection: asyncssh.SSHServerConnection, words: bytes) -> None:
    connection.send_packet(MSG_DISCONNECT, UInt32(2), String(words), String(b""))


Way = Callable[[World], Awaitable[None]]
WAYS: dict[str, Way] = {}


def way(name: str) -> Callable[[Way], Way]:
    """Add a row to the table."""

    def add(function: Way) -> Way:
        WAYS[name] = function
        return function

    return add


# --- sshd


@way("sshd's reason to disconnect, in a command")
async def _(world: World) -> None:
    world.hangs_up()
    with world.raises(GuestError):
        await world.ssh.exec(["true"])


@way("sshd's reason to disconnect, in a connect")
async def _(world: World) -> None:
    def hang_up(_user: str) -> bool:
        disconnect(world.sshd.connections[-1], world.words)
        return True

    world.sshd.begin_auth = hang_up  # type: ignore[method-assign]
    with world.raises(GuestError):
        await world.ssh.connect()


@way("sshd's reason to disconnect, while we listen")
async def _(world: World) -> None:
    def hang_up(_host: str, _port: int) -> bool:
        disconnect(world.sshd.connections[-1], world.words)
        return False

    world.sshd.server_requested = hang_up  # type: ignore[method-assign]
    await world.ssh.connect()
    with world.raises(GuestError):
        await world.ssh.listen_in_guest(7, None, release=["true"])  # type: ignore[arg-type]


@way("sshd's reason to open no channel")
async def _(world: World) -> None:
    def refuse(*_: object) -> None:
        raise asyncssh.ChannelOpenError(2, world.json_words)

    await world.ssh.connect()
    world.sshd.connections[-1]._process_session_open = refuse  # type: ignore[method-assign,assignment]
    with world.raises(GuestError):
        await world.ssh.exec(["true"])


# --- commands in the guest


@way("stderr of the command that lets containers start")
async def _(world: World) -> None:
    world.answers(stderr=world.words, status=1)
    await PROFILES["ovm"].let_containers_start(world.ssh)


@way("stderr of the firewall")
async def _(world: World) -> None:
    world.answers(stderr=world.words, status=1)
    with world.raises(GuestError):
        await PROFILES["ovm"].block_port(world.ssh, 2222)


@way("the clock helper's answer")
async def _(world: World) -> None:
    async def serve(process: asyncssh.SSHServerProcess[bytes]) -> None:
        await process.stdin.readline()
        process.stdout.write(world.words.replace(b"\n", b"") + b"\n")

    world.sshd.serve = serve
    with world.raises(GuestError):
        await world.session().sync_clock()


@way("the health report")
async def _(world: World) -> None:
    world.answers(stdout=world.words)
    with world.raises(GuestError):
        await health._guest(world.session())
    world.told += (await health.look(world.session())).health.problems


@way("stderr of the trim")
async def _(world: World) -> None:
    world.answers(stderr=world.words, status=1)
    assert await prune.trim(world.ssh) is None


@way("names of the guest's units")
async def _(world: World) -> None:
    told = f"Id={world.json_words}\nInactiveExitTimestampMonotonic=1\nActiveEnterTimestampMonotonic=9"
    units = timeline.units(told.replace("\r", "").replace("\n2026", "2026"), [Stage("guest: ready", 900.0, 800.0)])
    world.told += [timeline.table(units), timeline.svg(units, "title")]


# --- the channel of the boot, and the console


@way("lines of the ready channel")
async def _(world: World) -> None:
    path = world.directory / "ready.sock"
    async with boot_channel.listen(path, logging.getLogger("ovm.boot").warning, lambda: None) as channel:
        words = world.words.replace(b"\n", b"")
        reader, writer = await asyncio.open_unix_connection(path)
        for line in (b"warn %b", b"stage %b 1.0", b"%b", b"fatal odd %b"):
            writer.write(line % words + b"\n")
        writer.write_eof()
        await reader.read()
        writer.close()
        with world.raises(OVMError):
            await channel.wait()
        world.told += [stage.name for stage in channel.stages]


@way("a panic on the console")
async def _(world: World) -> None:
    session = world.session()
    session.console_log.write_bytes(b"x\n" + boot.PANIC.encode() + world.words + b"\nI/O error " + world.words + b"\n")
    for error in (await boot.boot_error(session, "it fell"), await boot.find_panic(session)):
        with world.raises(OVMError):
            assert error is not None
            raise error
    world.told.append(await shutdown._disk_trouble(session))


# --- podman


ANSWERS = {
    "body": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n%b",
    "status": b"HTTP/1.1 500 %.0d%b\r\nContent-Length: 0\r\n\r\n",
    "header": b"HTTP/1.1 200 OK\r\n%.0d%b: x\r\nContent-Length: 2\r\n\r\nOK",
    "first line": b"%.0d%b\r\n\r\n",
    "half": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%.0d%b",
}


def add_podman(name: str, form: bytes) -> None:
    @way(f"podman's answer to a ping: {name}")
    async def _(world: World) -> None:
        async with world.podman(form % (len(world.words), world.words)) as path:
            world.answers()
            session = world.session()
            for asking in (session.ping(timeout_s=5), prune.prune(path, world.ssh)):
                with world.raises(GuestError, always=False):  # a name of a header may be one
                    await asking
            world.told += (await health.look(session)).health.problems
            with world.raises(WireError, always=False):
                await asyncio.to_thread(_read_plainly, path)


def _read_plainly(path: Path) -> None:
    with plain.request(path, "GET", "/", timeout_s=5) as answer:
        answer.read()


for _name, _form in ANSWERS.items():
    add_podman(_name, _form)


@way("what podman could not remove")
async def _(world: World) -> None:
    items = [{"Id": world.json_words, "Err": world.json_words}, {"Id": "x", "Err": {world.json_words: 1}}]
    body = json.dumps({"ContainerPruneReports": items}).encode()
    world.answers(stdout=b"/x: 1 GiB (5 bytes) trimmed\n")
    async with world.podman(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)) as path:
        world.told += (await prune.prune(path, world.ssh)).failures
    assert len(world.told) == 2


@way("an answer of another shape")
async def _(world: World) -> None:
    body = json.dumps({"state": world.json_words}).encode()
    async with world.podman(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)) as path:
        async with http.connect(path) as api:
            with world.raises(WireError):
                await api.get("/", StateInfo)
        with world.raises(OVMError):
            await asyncio.to_thread(client.Service("dev", path).info)


# --- hypervisors and helpers


@way("QEMU's words on a disk")
async def _(world: World) -> None:
    for action in ("stop", "report"):
        data = {"node-name": world.json_words, "reason": world.json_words, "action": action}
        happening = qemu_events.disk_failure(Message({"event": "BLOCK_IO_ERROR", "data": data}))
        assert happening is not None
        logging.getLogger("ovm").warning("%s", happening[1])
        world.told.append(happening[1])


@way("vfkit's words on an order")
async def _(world: World) -> None:
    content = json.dumps({"error": world.json_words}).encode()
    world.told.append(vfkit._words(WireError(content.decode(), 500, content)))
    world.told.append(vfkit._words(WireError(world.json_words, 500, world.words)))


@way("what a helper prints instead of its version")
async def _(world: World) -> None:
    program = world.directory / "gvproxy"
    (world.directory / "words").write_bytes(world.words)
    program.write_text(f"#!/bin/sh\ncat {world.directory}/words\n")
    program.chmod(0o755)
    with world.raises(OVMError):
        await probe.check_helper(program, probe.GVPROXY)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a program that uses the library would log, with a formatter of its own."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.formatter.formatTime = lambda *_: "at once"  # type: ignore[union-attr,method-assign,assignment]
    logger = logging.getLogger("ovm")
    before, logger.level = logger.level, logging.DEBUG
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", WAYS)
async def test_no_way_lets_them_through(
    name: str, hostile: str, short_path: Path, guest_keys: KeyPaths, log: io.StringIO
) -> None:
    """B2: whatever a guest says, no exception, log line or value shown has anything in it that a terminal obeys."""
    async with asyncio.timeout(30), sshds.running(guest_keys) as server:
        world = World(short_path, guest_keys, server, server.client(), HOSTILE[hostile], log)
        try:
            await WAYS[name](world)
        finally:
            await world.ssh.close()
    for told in [*world.told, log.getvalue()]:
        assert_fit(told)
    assert world.told or log.getvalue() or name.startswith("podman"), "the way leads nowhere"


# --- the log of the service


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_record_can_look_like_two(hostile: str) -> None:
    """B2: whatever is logged, each line of service.log that looks like a record is one, tracebacks included."""
    words = HOSTILE[hostile].decode(errors="surrogateescape")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(journal.Formatter(journal.SERVICE_FORMAT))
    logger = logging.Logger("ovm")  # noqa: LOG001 - of this test's own
    logger.addHandler(handler)
    logger.warning("the guest said: %s", words)
    logger.warning(words)
    try:
        raise ValueError(words)
    except ValueError:
        logger.exception("a library failed with %s", words)
    lines = stream.getvalue().split("\n")
    records = [line for line in lines if not line.startswith(journal.CONTINUED) and line]
    assert len(records) == 3
    assert all(" ovm: " in line for line in records)
    assert any(f"{journal.CONTINUED}Traceback" in line for line in lines)
    for line in lines:
        assert all(c.isprintable() or c == "\t" for c in line)


def test_the_service_logs_so(short_path: Path) -> None:
    """B2: the process of the service has that formatter before it does anything, and so has a command."""
    script = (
        "import logging\nfrom ovm.service import journal\njournal.{begin}()\n"
        "logging.getLogger('x').warning('\\x1b[2J\\n2026-01-01 forged')\n"
        "try: raise ValueError('\\x9b\\n2026-01-01 forged')\n"
        "except ValueError: logging.getLogger('x').exception('fell')\n"
    )
    for begin in ("begin", "begin_command"):
        ended = subprocess.run(
            [sys.executable, "-c", script.format(begin=begin)], capture_output=True, check=True, timeout=30
        )
        lines = ended.stderr.decode().splitlines()
        assert len(lines) > 4
        assert all(line.isprintable() for line in lines)
        assert not [line for line in lines if line.startswith("2026-01-01 forged")]


@pytest.mark.parametrize("fails", ["with an error of ours", "with any other"])
def test_a_real_service_logs_so(fails: str, served: Path) -> None:
    """B2: what a service writes to its log while it fails is one record for each thing that was logged."""
    machine = machines.find("dev")
    machine.write_settings("")
    # as an editor would: a command refuses an image that is not there
    machine.settings_path.write_text('image = "/\\u001b[2J\\u202e\\n' + FORGED + '"\n')
    script = "from ovm.service import run; import sys; sys.exit(run.main(['dev']))"
    if fails == "with any other":
        script = (
            "from ovm.service import run; import sys\n"
            "def serve(*_, **__): raise ValueError('\\x1b[2J\\n" + FORGED + "')\n"
            "run.serve = serve\nsys.exit(run.main(['dev']))"
        )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    lines = ended.stderr.decode().splitlines()
    assert ended.returncode == 1
    assert any(FORGED in line for line in lines)
    assert_fit(ended.stderr.decode())
    assert all(" ERROR ovm." in line or " INFO ovm." in line or line.startswith(journal.CONTINUED) for line in lines)


# --- the commands, against a service that says what it likes


def _status(words: str) -> dict[str, Any]:
    return {
        "name": words, "state": VMState.RUNNING.value, "step": words, "health": {"problems": [words]},
        "restart_needed": [words], "started_at": 1.0, "pid": 1, "version": __version__, "api": protocol.API,
    }  # fmt: skip


def _info(words: str) -> dict[str, Any]:
    return {
        **dict.fromkeys(
            ("docker_host", "podman_socket", "ssh_key", "ssh_user", "hypervisor", "accelerator", "accelerator_reason",
             "data_disk", "log_dir", "not_resumed"), words,
        ),
        "podman_port": None, "ssh_port": 1, "cpus": 1, "memory_mib": 1, "health": {"problems": [words]},
        "timings": [{"name": words, "ms": 1.0, "uptime_ms": None}],
    }  # fmt: skip


def _events(words: str) -> list[dict[str, Any]]:
    error = {"code": words, "message": words, "hint": words, "log_tail": [words]}
    return [
        {"id": 1, "name": "step", "at": 1.0, "step": words},
        {"id": 2, "name": "error", "at": 1.0, "error": error},
        {"id": 3, "name": "health", "at": 1.0, "health": {"problems": [words]}},
    ]


def _ports(words: str) -> list[dict[str, Any]]:
    return [{"protocol": "tcp", "host_address": words, "host_port": 1, "guest_port": 2, "purpose": "container"}]


@contextlib.contextmanager
def service(path: Path, words: str, *, status: int = 200) -> Iterator[None]:
    """A service whose every answer is made of ``words``; with another ``status`` it refuses with them."""
    answers = {"/v1/status": _status, "/v1/info": _info, "/v1/ports": _ports}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()

    def content(target: str) -> bytes:
        if status != 200 and not target.startswith("/v1/status"):
            error = {"code": words, "message": words, "hint": words, "log_tail": [words], "exit_reason": words}
            return msgspec.json.encode({"error": error})
        if target.startswith("/v1/events"):
            return b"".join(b"data: " + msgspec.json.encode(told) + b"\n\n" for told in _events(words))
        return msgspec.json.encode(answers[target](words) if target in answers else {"state": words})

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as asked:
                    target = (asked.readline().decode().split() or ["", ""])[1]
                    while asked.readline().strip():
                        pass
                    body = content(target)
                    code = 200 if target.startswith("/v1/status") else status
                    connection.sendall(b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n%b" % (code, len(body), body))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        path.unlink()


@pytest.fixture
def served(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The socket of the service of the machine ``dev``."""
    monkeypatch.setenv("OVM_HOME", str(short_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
        cli.main(["init", "dev"])
    machine = machines.find("dev")
    machine.sockets.directory.mkdir(parents=True, mode=0o700, exist_ok=True)
    return machine.service_socket


COMMANDS = [
    ["status", "dev"],
    ["status", "dev", "--json"],
    ["status", "dev", "--format", "{name} {state} {step} {health} {restart_needed[0]}"],
    ["info", "dev"],
    ["info", "dev", "--json"],
    ["info", "dev", "--format", "{docker_host}{hypervisor}{health}{timings}"],
    ["events", "dev"],
    ["events", "dev", "--json"],
    ["events", "dev", "--format", "{id} {name}"],
    ["port", "ls", "dev"],
    ["port", "ls", "dev", "--json"],
    ["port", "ls", "dev", "--format", "{host}"],
    ["ls"],
    ["ls", "--json"],
    ["clocksync", "dev"],
    ["pause", "dev"],
]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_no_command_prints_them(
    argv: list[str], hostile: str, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B2: nothing that a service answers reaches a terminal as it is, in words, in JSON or by ``--format``."""
    words = HOSTILE[hostile].decode(errors="replace")
    said = ""
    for status in (200, 500):
        with service(served, words, status=status), pytest.raises(SystemExit):
            cli.main(argv)
        printed = capsys.readouterr()
        said += printed.out + printed.err
        if "--json" in argv:
            assert printed.out.isascii()
    assert said
    assert_fit(said)
    assert "Traceback" not in said


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("argv", [["status", "dev"], ["status", "dev", "--format", "{why}"], ["ls"], ["ls", "--json"]])
def test_no_record_of_a_machine_at_rest_prints_them(
    argv: list[str], hostile: str, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B2: what a machine failed of may be the guest's words, and is kept in a file."""
    words = HOSTILE[hostile].decode(errors="replace")
    assert not served.exists()
    records.save(machines.find("dev").ended_record, records.Ended(at=1.0, reason="failed", message=f"why: {words}"))
    with pytest.raises(SystemExit):
        cli.main(argv)
    said = "".join(capsys.readouterr())
    assert "why: " in said
    assert_fit(said)


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("as_json", [True, False])
def test_a_prune_prints_none(as_json: bool, hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    """B2: what podman could not remove has a name that somebody in the guest has chosen."""
    done = Pruned(removed={}, freed_bytes={}, trimmed_bytes=None, failures=(HOSTILE[hostile].decode(errors="replace"),))
    cli_prune._show(done, 1, 1, as_json=as_json)
    printed = capsys.readouterr()
    assert_fit(printed.out + printed.err)
    assert "failures" in printed.out if as_json else "not removed: " in printed.err


@pytest.mark.parametrize("mode", ["plain", "auto"])
@pytest.mark.parametrize("hostile", HOSTILE)
async def test_a_start_in_the_foreground_prints_none(
    hostile: str, mode: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """B2: what happens to a machine whose service is the command itself is shown without them, too."""
    words = HOSTILE[hostile].decode(errors="replace")
    history = History()
    history.add("step", step=words)
    history.add("ready")
    history.add("health", health=Health(problems=(words,)))
    history._told.append(Event(4, "error", from_dict({"message": words})))
    history.end()
    host: Any = SimpleNamespace(name="dev", history=history, stop_wanted=False, machine=SimpleNamespace(info=None))
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        assert await foreground._tell(host, steps(mode), lambda _info: None)
    told = shown.getvalue() + capsys.readouterr().err
    assert "dev: " in told
    assert_fit(told)


def test_whatever_is_printed_passes_the_outlet() -> None:
    """B2: no command prints past ``cli/outlet.py``, but for scripts that a shell is to run."""
    scripts = {"outlet.py", "completion.py", "env.py"}
    directory = Path(cli.__file__).parent
    past = {
        path.name
        for path in directory.glob("*.py")
        if re.search(r"\b(?:print|click\.echo|click\.secho|sys\.std(?:out|err)\.write)\(", path.read_text())
    }
    assert past <= scripts
