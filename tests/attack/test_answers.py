"""B7: every answer of the guest, of a service and of a helper has a limit of its size, and a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncssh
import msgspec
import pytest

import sshds
from ovm.errors import GuestError, HelperError
from ovm.guest import clock as clock_module
from ovm.guest import ssh as ssh_module
from ovm.guest.clock import Clock
from ovm.guest.ssh import ANSWER_MAX_BYTES, SSH
from ovm.machine import health, profiles, prune
from ovm.machine.vm import OVM
from ovm.process import probe
from ovm.service import protocol
from ovm.service.remote import RemoteOVM
from ovm.sync import RemoteOVM as BlockingRemote
from ovm.wire import http
from ovm.wire.error import WireError

AHEAD_BYTES = 8 << 20
"""What may be on the way beyond a limit: ssh's window, and the buffers of sockets."""
MIB = 1 << 20


class Flood:
    """A command that never ends its output; what was taken from it is counted."""

    def __init__(self, stream: str, *, line_end: bytes = b"") -> None:
        self.stream = stream
        self.line_end = line_end
        self.sent = 0

    async def serve(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        """Send, for as long as somebody takes it."""
        piece = b"0" * 65536 + self.line_end
        writer = getattr(process, self.stream)
        while True:
            writer.write(piece)
            await writer.drain()
            self.sent += len(piece)


COMMANDS: dict[str, Callable[[SSH], Awaitable[object]]] = {
    "any": lambda ssh: ssh.exec(["true"], timeout_s=20),
    "trim": prune.trim,
    "chrony": lambda ssh: Clock(ssh).kick_chrony(),
    "clock": lambda ssh: Clock(ssh).sync(),
}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("command", COMMANDS)
async def test_a_command_that_never_ends_its_output_is_ended(
    sshd: sshds.Sshd, ssh: SSH, command: str, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B7: a command of ours in the guest is ended at its limit, and the manager has taken no more than that."""
    monkeypatch.setattr(clock_module, "ANSWER_TIMEOUT_S", 1.0)  # stderr of the clock's helper is not read at all
    flood = Flood(stream)
    sshd.serve = flood.serve
    async with asyncio.timeout(30):
        with pytest.raises(GuestError):
            await COMMANDS[command](ssh)
    assert flood.sent < 2 * (ANSWER_MAX_BYTES + AHEAD_BYTES)  # the clock's helper is started twice


async def test_the_limit_is_told(sshd: sshds.Sshd, ssh: SSH) -> None:
    """B7: the error says which command it was, and how much is taken."""
    sshd.serve = Flood("stdout").serve
    with pytest.raises(GuestError, match=f"'/usr/lib/ovm/health' printed more than {ANSWER_MAX_BYTES} bytes"):
        await ssh.exec([profiles.HEALTH], timeout_s=20)


async def test_output_up_to_the_limit_is_taken(ssh: SSH) -> None:
    """B7: both streams count together, and the limit itself is not too much."""
    script = ["sh", "-c", "printf 12345; printf 67890 >&2"]
    result = await ssh.exec(script, max_output_bytes=10)
    assert (result.stdout, result.stderr) == (b"12345", b"67890")
    with pytest.raises(GuestError, match="more than 9 bytes"):
        await ssh.exec(script, max_output_bytes=9)
    assert len((await ssh.exec(["head", "-c", str(3 * MIB), "/dev/zero"], max_output_bytes=None)).stdout) == 3 * MIB


async def test_what_goes_to_a_callback_has_no_limit(ssh: SSH) -> None:
    """B7: whoever takes the output as it comes gets all of it."""
    taken = 0

    def take(piece: bytes) -> None:
        nonlocal taken
        taken += len(piece)

    await ssh.exec(["head", "-c", str(3 * MIB), "/dev/zero"], on_stdout=take, max_output_bytes=10)
    assert taken == 3 * MIB


@pytest.mark.parametrize("machine", [OVM, RemoteOVM, BlockingRemote])
def test_the_users_own_commands_have_a_limit(machine: type[Any]) -> None:
    """B7: unless the user chooses another, or none."""
    assert machine.exec.__kwdefaults__["max_output_bytes"] == 64 * MIB


async def _never(*_: object) -> bool:
    await asyncio.Event().wait()
    return True


async def test_a_guest_that_never_answers_to_a_forward_is_given_up(
    sshd: sshds.Sshd, ssh: SSH, monkeypatch: pytest.MonkeyPatch, unused_path: Path
) -> None:
    """B7: what follows a connect has a deadline, or every later command would wait for the first one's connection."""
    monkeypatch.setattr(ssh_module, "FOLLOW_UP_TIMEOUT_S", 0.1)
    monkeypatch.setattr(type(sshd), "unix_server_requested", _never)
    ssh.lend_socket(unused_path, "/lent.sock")
    async with asyncio.timeout(5):
        for _ in range(2):
            with pytest.raises(GuestError, match=r"did not answer within 0\.1 s"):
                await ssh.exec(["true"])


@pytest.fixture
def unused_path(short_path: Path) -> Path:
    """Where no socket is."""
    return short_path / "none.sock"


async def test_a_command_that_is_never_started_is_given_up(
    sshd: sshds.Sshd, ssh: SSH, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B7: also where the caller has set no deadline of its own."""
    monkeypatch.setattr(ssh_module, "OPEN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(ssh_module, "CLOSE_TIMEOUT_S", 0.02)
    await ssh.connect()
    monkeypatch.setattr(asyncssh.SSHServerChannel, "_finish_open_request", _never)
    async with asyncio.timeout(5):
        with pytest.raises(GuestError, match=r"could not be started in the guest within 0\.1 s"):
            await ssh.exec(["true"])


# --- servers on unix sockets


@contextlib.asynccontextmanager
async def server(path: Path, head: bytes, piece: bytes, *, hangs: bool = False) -> AsyncIterator[http.UnixHTTP]:
    """One that sends ``head`` and then ``piece`` again and again, or nothing more; and a client of it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            while True:
                if hangs:
                    await reader.read(1)
                    return
                writer.write(piece)
                await writer.drain()

    async with await asyncio.start_unix_server(serve, path), http.connect(path) as client:
        yield client


async def read(client: http.UnixHTTP) -> None:
    """Every line of an answer."""
    async with client.lines("GET", "/x") as lines:
        async for _ in lines:
            pass


OK, REFUSED = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n"


@pytest.mark.parametrize(("head", "words"), [(OK, "a line of more than"), (REFUSED, "a response of more than")])
async def test_an_answer_without_an_end_is_given_up(short_path: Path, head: bytes, words: str) -> None:
    """B7: read line by line, an endless line is an error, and so is an endless refusal."""
    async with asyncio.timeout(20), server(short_path / "s", head, b"0" * 65536) as client:
        with pytest.raises(WireError, match=words):
            await read(client)


async def test_a_refusal_that_never_comes_is_given_up(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B7: a server that refuses and then says nothing is not waited for without end."""
    monkeypatch.setattr(http, "REQUEST_TIMEOUT_S", 0.1)
    async with asyncio.timeout(5), server(short_path / "s", REFUSED, b"", hangs=True) as client:
        with pytest.raises(WireError, match=r"status 500, incomplete after 0\.1 s"):
            await read(client)


async def test_lines_end_where_json_says(short_path: Path) -> None:
    """Of all that Unicode calls an end of a line, the line feed alone is one."""
    told = json.dumps("one\u2028two\x85three", ensure_ascii=False).encode()
    body = told + b"\r\n" + told
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with server(short_path / "s", head, b"", hangs=True) as client, client.lines("GET", "/x") as lines:
        assert [line async for line in lines] == [told, told]


async def test_output_by_way_of_a_service_has_the_limit_too(short_path: Path) -> None:
    """B7: a service that never ends a command's output fills no memory of its client."""
    piece = msgspec.json.encode(protocol.Piece(stdout=b"0" * 65536)) + b"\n"
    status: Any = protocol.Status(
        name="dev", state="", step="", started_at=0.0, pid=1, version="", api=1, health=None, restart_needed=[]
    )
    async with asyncio.timeout(20), server(short_path / "s", OK, piece) as api, contextlib.AsyncExitStack() as stack:
        machine = RemoteOVM("dev", short_path / "s", api, stack, status)
        with pytest.raises(GuestError, match=f"more than {MIB} bytes"):
            await machine.exec(["cat", "/dev/zero"], max_output_bytes=MIB)


# --- helpers, and numbers


async def test_a_helper_that_never_ends_its_version_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B7: a program that is asked for its version is ended when it prints too much."""
    monkeypatch.setattr(probe, "OUTPUT_MAX_BYTES", MIB)
    program = tmp_path / "gvproxy"
    program.write_text("#!/bin/sh\nexec cat /dev/zero\n")
    program.chmod(0o755)
    began = time.monotonic()
    with pytest.raises(HelperError, match=f"printed more than {MIB} bytes"):
        await probe.check_helper(program, probe.GVPROXY)
    assert time.monotonic() - began < probe.PROBE_TIMEOUT_S


def test_a_version_of_many_digits_is_none() -> None:
    """B7: Python refuses to read a number of 5000 digits, which is no reason to fall."""
    assert probe.parse_version(f"gvproxy version v{'9' * 5000}", probe.GVPROXY.pattern) is None


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 20, "-1", str(1 << 63)])
def test_numbers_that_no_disk_has_are_refused(number: str) -> None:
    """B7: a report with them is an error, and nothing that JSON cannot carry."""
    for report in (f"{number} 1 rw 0", f"1 {number} rw 0", f"1 1 rw {number}"):
        with pytest.raises(GuestError, match="is malformed"):
            health.parse(report.encode())


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 20, "-1", str(1 << 63)])
@pytest.mark.parametrize("where", ["podman", "fstrim"])
async def test_rooms_that_no_disk_has_are_refused(
    sshd: sshds.Sshd, ssh: SSH, short_path: Path, number: str, where: str
) -> None:
    """B7: podman's and fstrim's numbers, likewise."""

    async def serve(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(b"/x: 1 GiB (%b bytes) trimmed\n" % (number if where == "fstrim" else "5").encode())
        process.exit(0)

    sshd.serve = serve
    size = number if where == "podman" else "5"
    body = f'{{"ImagePruneReports": [{{"Id": "x", "Size": {size}}}]}}'.encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with server(short_path / "s", head, b"", hangs=True):
        if where == "podman":
            with pytest.raises(GuestError, match="is malformed"):
                await prune.prune(short_path / "s", ssh)
        else:
            done = await prune.prune(short_path / "s", ssh)
            assert done.trimmed_bytes is None
            assert msgspec.json.encode(done)
