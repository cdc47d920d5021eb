"""Generated answers of helpers, which are not believed blindly: QEMU's over QMP, vfkit's and gvproxy's over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
import vmspecs
from ovm.errors import GuestError, PortError, StartError
from ovm.hypervisors import Happening, qemu, vfkit
from ovm.hypervisors.accel import Emulator
from ovm.model.ports import Forward
from ovm.model.states import VMState
from ovm.network import forwarding
from ovm.network.forwarding import Network
from ovm.network.host_ports import free_port
from ovm.paths import SocketPaths
from ovm.process.child import Child
from ovm.text.printable import LENGTH_MAX
from ovm.wire import http
from ovm.wire.error import WireError

SOON_S = 0.3
"""In place of all deadlines: what is not answered here never will be."""
BOUND_S = 30.0

# HTTP

STATE = {"state": "VirtualMachineStateRunning", "canPause": True, "canResume": False, "canStop": True}
PAUSED = {"state": "VirtualMachineStatePaused", "canPause": False, "canHardStop": True, "vcpu": 2}
ERROR = {"error": "no such thing"}

STATUSES = [b"200 OK"] * 6 + [b"202 Accepted", b"204 No Content", b"404 Not Found", b"500 No", b"301 Moved", b"100 Go"]
STATUSES += [b"999 \xff", b"099 x", b"20 x", b"200", b"", b"2000 x"]
HEADERS = [
    b"content-encoding: gzip", b"content-encoding: br", b"content-encoding: zstd", b"content-encoding: deflate, gzip",
    b"content-encoding: \xff", b"content-type: text/plain; charset=hex", b"content-type: text/plain; charset=utf-16",
    b"content-type: text/plain; charset=\xff", b"content-type: text/plain; charset=undefined",
    b"location: http://localhost:1/", b"location: \xff", b"location: //[", b"set-cookie: a=b", b"set-cookie: \xff=;;",
    b"transfer-encoding: chunked", b"transfer-encoding: gzip", b"content-length: 5", b"content-length: -1",
    b"content-length: 99999999999999999999", b"connection: close", b"connection: upgrade", b"upgrade: x",
    b"a" * 70_000 + b": b", b"no colon", b"nul: \0", b" folded", b": ", b"\xff: \xff",
]  # fmt: skip


@st.composite
def responses(draw: st.DrawFn) -> tuple[bytes, bool]:
    """What a server sends, and whether it hangs up then or says nothing more."""
    body = draw(fuzz.documents(STATE, PAUSED, ERROR))
    length = draw(st.sampled_from([len(body)] * 4 + [len(body) + 1, max(0, len(body) - 1)]))
    headers = draw(st.lists(st.sampled_from(HEADERS), max_size=2))
    if draw(st.sampled_from([True, True, True, False])):
        headers.append(b"content-length: %d" % length)
    lines = [
        draw(st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2", b"", b"\xff"])),
        draw(st.sampled_from(STATUSES)),
    ]
    answer = b" ".join(lines) + b"\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body
    if draw(st.sampled_from([False, False, False, True])):
        answer = fuzz.mutated(draw, answer)
    return answer, draw(st.sampled_from([True, True, True, True, False]))


class Server:
    """Listens on a unix socket, and sends what it is told to; then it hangs up, or never does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[tuple[bytes, bool]] = []
        self._connections: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while self.answers:
                await reader.readuntil(b"\r\n\r\n")
                answer, hangs_up = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                writer.write(answer)
                await writer.drain()
                if hangs_up:
                    break
        if not self.answers or self.answers[0][1]:
            writer.close()

    def hang_up(self) -> None:
        for writer in self._connections:
            writer.close()
        self._connections.clear()


@pytest.fixture
async def server(short_path: Path) -> AsyncIterator[Server]:
    served = Server(short_path / "s")
    listening = await asyncio.start_unix_server(served.serve, served.path)
    yield served
    listening.close()
    served.hang_up()


@fuzz.examples(3000)
@given(answer=responses())
async def test_whatever_a_server_answers(server: Server, answer: tuple[bytes, bool]) -> None:
    """It is taken, or a WireError with words that can be shown."""
    server.answers = [answer]
    async with asyncio.timeout(BOUND_S), http.connect(server.path) as client:
        for ask in (
            lambda: client.get("/vm/state", vfkit._State, timeout_s=SOON_S),
            lambda: client.text("/_ping", timeout_s=SOON_S),
            lambda: client.post("/services/forwarder/expose", {"local": ":1"}, timeout_s=SOON_S),
        ):
            words = "taken"
            try:
                await ask()
            except WireError as error:
                words = error.message
            assert 0 < len(words) <= LENGTH_MAX + len("POST /services/forwarder/expose: ")
    server.hang_up()


async def test_an_answer_without_end_is_not_waited_for(server: Server) -> None:
    """Nor kept: there is a limit to what anybody has to say."""
    server.answers = [(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2 * http.ANSWER_MAX_BYTES), False)]
    async with http.connect(server.path) as client:
        with pytest.raises(WireError, match="more than 1048576 bytes"):
            await client.text("/_ping", timeout_s=BOUND_S)


@fuzz.examples(1500)
@given(answers=st.lists(responses(), min_size=1, max_size=4))
async def test_whatever_vfkit_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch, answers: list[tuple[bytes, bool]]
) -> None:
    """Its state or a GuestError to a question; an order is carried out or is one; a hard stop never fails."""
    for name in ("ANSWER_TIMEOUT_S", "PAUSE_TIMEOUT_S", "SETTLE_RETRY_S"):
        monkeypatch.setattr(vfkit, name, SOON_S / 3)
    server.answers = answers
    async with asyncio.timeout(BOUND_S), http.connect(server.path) as client:
        vm = vfkit.Vfkit(Child("vfkit", None), client)  # type: ignore[arg-type]
        with contextlib.suppress(GuestError):
            assert await vm.state() in VMState
        for order in (vm.pause, vm.resume):
            with contextlib.suppress(GuestError):
                await order()
        assert await vm.request_stop() in {True, False}
        await vm.force_stop()
    server.hang_up()


@fuzz.examples(1500)
@given(answer=responses())
async def test_whatever_gvproxy_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch, answer: tuple[bytes, bool]
) -> None:
    """A port is open or a PortError."""
    monkeypatch.setitem(http.UnixHTTP.post.__kwdefaults__, "timeout_s", SOON_S)
    monkeypatch.setattr(forwarding, "PICK_ATTEMPTS", 2)
    server.answers = [answer]
    port = free_port("tcp", "127.0.0.1", 0)
    assert port
    forward = Forward(protocol="tcp", host_address="127.0.0.1", host_port=port, guest_port=80)
    sockets = SocketPaths(server.path.parent)
    async with asyncio.timeout(BOUND_S), http.connect(server.path) as client:
        network = Network(None, sockets, client)  # type: ignore[arg-type]
        network._ports.gvproxy_is_up()
        for order in (
            lambda: network.expose(forward),
            lambda: network.unexpose(forward),
            lambda: network.pick(80),
            lambda: network.expose_socket(sockets.made_by_gvproxy(sockets.podman), 58125),
        ):
            with contextlib.suppress(PortError):
                await order()
    server.hang_up()


# QMP

GREETING = {"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}
RETURNS = [
    {"return": {}},
    {"return": {"status": "running", "running": True, "singlestep": False}},
    {"return": {"status": "io-error", "running": False}},
    {"return": []},
    {"error": {"class": "GenericError", "desc": "it cannot be"}},
]
WHEN = {"seconds": 1, "microseconds": 2}
EVENTS = [
    {"event": "STOP", "timestamp": WHEN},
    {"event": "RESUME", "timestamp": WHEN},
    {"event": "RESET", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": WHEN},
    {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}, "timestamp": WHEN},
    {
        "event": "BLOCK_IO_ERROR",
        "data": {"action": "stop", "node-name": "ovm-data", "nospace": True, "reason": "No space left on device"},
        "timestamp": WHEN,
    },
    {"event": "GUEST_PANICKED", "data": {"action": "pause", "info": {"type": "hyper-v", "arg1": 1}}, "timestamp": WHEN},
    {"event": "MEMORY_FAILURE", "data": {"flags": {"recursive": False}}, "timestamp": WHEN},
    {"event": "DEVICE_DELETED", "data": {"path": "/x"}, "timestamp": WHEN},
]

Said = tuple[bytes, bool]
"""A message, and whether it bears the number of the question it is the answer to."""


class FakeQEMU:
    """In the place of the group that spawns it: a process that sleeps, whose end of the socket pair we speak on."""

    def __init__(self, greeting: bytes, said: Sequence[Said], *, hangs_up: bool) -> None:
        self.greeting, self.said, self.hangs_up = greeting, list(said), hangs_up

    async def spawn(self, name: str, _argv: Sequence[str], *, log_path: Path, pass_fds: Sequence[int]) -> Child:
        end = socket.socket(fileno=os.dup(pass_fds[0]))
        reader, self.writer = await asyncio.open_connection(sock=end)
        self.speaking = asyncio.create_task(self.speak(reader))
        return Child(name, await asyncio.create_subprocess_exec("sleep", "600"), log_path)

    async def speak(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError), contextlib.closing(self.writer):
            self.writer.write(self.greeting + b"\r\n")
            async for asked in questions(reader):
                if asked["execute"] == "qmp_capabilities":
                    self.writer.write(b'{"return": {}}\r\n')
                    continue
                mark = b', "id": %s}' % json.dumps(asked["id"]).encode()
                for content, marked in self.said:
                    self.writer.write((content[:-1] + mark if marked else content) + b"\r\n")
                await self.writer.drain()
                if self.hangs_up:
                    return

    async def gone(self) -> None:
        self.speaking.cancel()
        await asyncio.wait({self.speaking})


async def questions(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """One after the other, with no line ends between them."""
    heard = ""
    while chunk := await reader.read(65536):
        heard += chunk.decode()
        while heard:
            try:
                asked, end = json.JSONDecoder().raw_decode(heard)
            except ValueError:
                break
            heard = heard[end:].lstrip()
            yield asked


def mostly(documents: Sequence[object]) -> st.SearchStrategy[bytes]:
    """As it should be twice out of three times, or nothing but the first word would ever be heard."""
    whole = st.sampled_from(documents).map(lambda document: json.dumps(document).encode())
    return st.one_of(whole, whole, fuzz.documents(*documents))


messages = st.one_of(
    st.tuples(mostly(RETURNS), st.sampled_from([True, True, True, False])),
    st.tuples(mostly(EVENTS), st.just(False)),
)


@fuzz.examples(1000)
@given(greeting=mostly([GREETING]), said=st.lists(messages, max_size=4), hangs_up=st.booleans())
async def test_whatever_qemu_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, greeting: bytes, said: list[Said], hangs_up: bool
) -> None:
    """It runs or a StartError; what it is asked for is done or a GuestError; what it tells of is in our words."""
    for name in ("QMP_START_S", "QMP_TIMEOUT_S", "END_GRACE_S"):
        monkeypatch.setattr(qemu, name, SOON_S / 3)
    told: list[tuple[Any, ...]] = []
    fake = FakeQEMU(greeting, said, hangs_up=hangs_up)
    emulator = Emulator(program=Path("/q"), version=(7, 2), arch="x86_64")
    running = qemu.start(
        fake,  # type: ignore[arg-type]
        vmspecs.SMALLEST, emulator, "tcg", log_path=tmp_path / "qemu.log", watcher=lambda *words: told.append(words),
    )  # fmt: skip
    try:
        async with asyncio.timeout(BOUND_S), running as vm:
            with contextlib.suppress(GuestError):
                assert await vm.state() in VMState
            for order in (vm.pause, vm.resume, lambda: vm.replug(Path("/n"))):
                with contextlib.suppress(GuestError):
                    await order()
            assert await vm.request_stop() in {True, False}
            await vm.force_stop()
    except StartError:
        pass
    finally:
        await fake.gone()
    for happening, words in told:
        assert happening in Happening
        assert isinstance(words, str)
