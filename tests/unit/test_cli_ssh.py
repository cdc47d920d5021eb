"""``ovm ssh``, ``exec`` and ``cp``: the real ssh and scp against an sshd, found by way of a gvproxy's API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import asyncssh
import pytest

from ovm import cli, paths
from ovm.model.states import VMState
from ovm.paths import KeyPaths, public

DEADLINE_S = 60.0
OVM = (sys.executable, "-m", "ovm")

Run = Callable[..., Awaitable[tuple[int, bytes, str]]]
"""What ``ovm ARGS`` makes of its input: status, stdout and stderr."""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, short_path: Path, guest_keys: KeyPaths) -> Path:
    """A home with a space in its path, and two machines with the keys of the sshd in it."""
    home = short_path / "a home"
    monkeypatch.setenv("OVM_HOME", str(home))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    monkeypatch.setenv("HOME", str(short_path))
    for name in ("default", "Dev_2.x"):
        shutil.copytree(guest_keys.directory, home / "machines" / name / "ssh")
    return home


@contextlib.asynccontextmanager
async def gvproxy(name: str, forwards: bytes) -> AsyncIterator[None]:
    """The API of the gvproxy of a machine, which tells of ``forwards``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        assert asked.startswith(b"GET /services/forwarder/all ")
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(forwards)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + forwards)
        await writer.drain()
        writer.close()

    socket = paths.SocketPaths(paths.default_socket_dir(name)).network_api
    socket.parent.mkdir(parents=True)
    async with await asyncio.start_unix_server(serve, socket):
        yield


def forwards_to(port: int) -> bytes:
    """What gvproxy says of a machine whose sshd is on ``port``."""
    return json.dumps(
        [
            {"local": "/run/podman.sock", "remote": "tcp://192.168.127.2:58125", "protocol": "unix"},
            {"local": "127.0.0.1:1", "remote": "192.168.127.2:8080", "protocol": "tcp"},
            {"local": f"127.0.0.1:{port}", "remote": "192.168.127.2:22", "protocol": "tcp"},
        ]
    ).encode()


class Became(BaseException):
    """The program that ovm would have become."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv


def become(_path: str, argv: list[str], _environment: dict[str, str]) -> NoReturn:
    raise Became(argv)


@pytest.fixture
def ovm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``ovm ARGS`` in this process, and what it becomes in another."""

    async def run(*args: str, given: bytes = b"") -> tuple[int, bytes, str]:
        try:
            with monkeypatch.context() as patched:
                patched.setattr(os, "execve", become)
                await asyncio.to_thread(cli.main, args)
        except SystemExit as ended:
            said = capsys.readouterr()
            return int(ended.code or 0), said.out.encode(), said.err
        except Became as became:
            return await ended_within(became.argv, given)
        raise AssertionError("it neither ended nor became another")

    return run


async def ended_within(argv: Sequence[str], given: bytes) -> tuple[int, bytes, str]:
    process = await asyncio.create_subprocess_exec(*argv, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate(given)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out, err.decode()


@pytest.fixture
async def running(home: Path, sshd) -> AsyncIterator[object]:
    """Both machines run, and that sshd is in either."""
    async with gvproxy("default", forwards_to(sshd.port)), gvproxy("Dev_2.x", forwards_to(sshd.port)):
        yield sshd


# --- exec


@pytest.mark.parametrize("name", [(), ("default",), ("Dev_2.x",)])
async def test_a_program_in_the_guest(running, name: tuple[str, ...]) -> None:
    """Its input, its two outputs and its status are those of the command."""
    script = "cat; echo told >&2; exit 7"
    argv = [*OVM, "exec", *name, "--", "sh", "-c", script]
    status, out, err = await ended_within(argv, b"a\0b\xff\n")
    assert (status, out, err) == (7, b"a\0b\xff\n", "told\n")


WORDS = ["a b", "it's", '"', "$HOME", "`x`", "*", "", "\\", "-n", "--", "ü", "a\nb", "~", "!", "#", ";", "&&"]


async def test_words_reach_it_as_they_are(ovm: Run, running) -> None:
    """No shell reads them, neither here nor there."""
    status, out, _ = await ovm("exec", "--", "printf", "[%s]", *WORDS)
    assert status == 0
    assert out.decode() == "".join(f"[{word}]" for word in WORDS)


async def test_a_paused_machine_says_so(ovm: Run, running, monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh would wait for its sshd, and fail of the key exchange."""
    paused = SimpleNamespace(state=VMState.PAUSED)
    monkeypatch.setattr("ovm.service.client.Service.status", lambda _self: paused)
    status, _, err = await ovm("exec", "--", "true")
    assert (status, "default is paused" in err, "ovm resume default" in err) == (1, True, True)


async def test_a_signal_is_a_status(ovm: Run, running) -> None:
    """As a shell would say it."""
    status, _, _ = await ovm("exec", "--", "sh", "-c", "kill -TERM $$")
    assert status == 128 + signal.SIGTERM


@pytest.mark.parametrize("tty", [True, False])
async def test_a_terminal_only_where_it_is_asked_for(running, tty: bool) -> None:
    """With -t, and a terminal here, the program gets one."""

    async def tell(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(f"terminal: {process.term_type}\n".encode())
        process.exit(0)

    running.serve = tell
    outside, inside = pty.openpty()
    argv = ("exec", *(["-t"] if tty else []), "--", "true")
    environment = os.environ | {"TERM": "xterm-256color"}
    process = await asyncio.create_subprocess_exec(
        *OVM, *argv, stdin=inside, stdout=PIPE, stderr=PIPE, env=environment, start_new_session=True
    )
    os.close(inside)
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    os.close(outside)
    assert (process.returncode, err) == (0, b"")
    assert out.strip() == (b"terminal: xterm-256color" if tty else b"terminal: None")


async def test_the_process_is_ssh(running) -> None:
    """Nothing of ours stands between: what ends ovm ends ssh, and with it the program's connection."""
    process: Process = await asyncio.create_subprocess_exec(
        *OVM, "exec", "--", "sh", "-c", "echo here; exec cat", stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), DEADLINE_S) == b"here\n"
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), DEADLINE_S) != 0
    async with asyncio.timeout(DEADLINE_S):
        await running.connections[-1].wait_closed()


# --- ssh


async def test_a_shells_words(ovm: Run, running) -> None:
    """What is behind -- goes to the guest's shell, as with ssh itself."""
    status, out, err = await ovm("ssh", "Dev_2.x", "--", "echo one two", "|", "wc -w")
    assert (status, out.strip(), err) == (0, b"2", "")


async def test_without_a_command_it_is_a_login(ovm: Run, running) -> None:
    """sshd is asked for a shell."""

    async def tell(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(f"command: {process.command}\n".encode())
        process.exit(3)

    running.serve = tell
    assert await ovm("ssh") == (3, b"command: None\n", "")


async def test_the_users_own_configuration_plays_no_part(ovm: Run, running, short_path: Path) -> None:
    """A block for all hosts has broken other tools."""
    (short_path / ".ssh").mkdir(mode=0o700)
    (short_path / ".ssh" / "config").write_text("Host *\n  Port 1\n  User nobody\n  ProxyCommand false\n")
    assert await ovm("exec", "--", "echo", "there") == (0, b"there\n", "")


async def test_another_host_key_is_refused(ovm: Run, running, home: Path) -> None:
    """Whoever has the port is not the guest; nothing is asked and no command is sent."""
    pinned = paths.public(KeyPaths(home / "machines" / "default" / "ssh").host_key)
    key = asyncssh.generate_private_key("ssh-ed25519")
    pinned.write_bytes(key.export_public_key())
    status, out, err = await ovm("exec", "--", "echo", "there")
    assert (status, out) == (255, b"")
    assert "HOST IDENTIFICATION HAS CHANGED" in err
    assert running.commands == []


async def test_the_line_for_the_users_configuration(ovm: Run, home: Path) -> None:
    """It needs no machine that runs, nor one at all."""
    shutil.rmtree(home / "machines")
    status, out, err = await ovm("ssh", "--config")
    assert (status, out.decode(), err) == (0, f'Include "{home}/machines/*/ssh_config"\n', "")


async def test_plain_ssh_after_that_line(ovm: Run, running, short_path: Path) -> None:
    """``ssh ovm-NAME`` works as ``ovm ssh NAME`` does."""
    assert (await ovm("exec", "--", "true"))[0] == 0
    _, line, _ = await ovm("ssh", "--config")
    (short_path / "config").write_bytes(line + b"Host *\n  Port 1\n")
    ssh = await asyncio.create_subprocess_exec(
        "ssh", "-F", short_path / "config", "ovm-default", "echo there", stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    assert await asyncio.wait_for(ssh.communicate(), DEADLINE_S) == (b"there\n", b"")


# --- cp


class Files(asyncssh.SFTPServer):
    """This host's files; a session ends with a status, as OpenSSH's own do."""

    def exit(self) -> None:
        self.channel.exit(0)


@pytest.fixture
async def guest(home: Path, guest_keys: KeyPaths) -> AsyncIterator[None]:
    """The default machine runs, with an sshd whose files are this host's."""
    acceptor = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[str(guest_keys.host_key)],
        authorized_client_keys=str(public(guest_keys.user_key)),
        sftp_factory=Files,
        gss_host=None,
    )
    async with acceptor, gvproxy("default", forwards_to(acceptor.get_port())):
        yield


@pytest.mark.usefixtures("guest")
async def test_a_directory_there_and_back(ovm: Run, tmp_path: Path) -> None:
    """With all that is in it: content, names, what may be executed."""
    here = tmp_path / "here"
    (here / "below" / "deeper").mkdir(parents=True)
    (here / "data").write_bytes(os.urandom(300_000))
    (here / "below" / "empty").touch()
    (here / "below" / "deeper" / "run me").write_text("#!/bin/sh\n")
    (here / "below" / "deeper" / "run me").chmod(0o755)
    assert await ovm("cp", str(here), f"default:{tmp_path}/there") == (0, b"", "")
    assert await ovm("cp", f"default:{tmp_path}/there", str(tmp_path / "back")) == (0, b"", "")
    assert tree(tmp_path / "back") == tree(here)


def tree(below: Path) -> dict[str, tuple[bool, bytes | None]]:
    """Every name, whether it may be executed, and what it holds."""
    return {
        str(path.relative_to(below)): (os.access(path, os.X_OK), path.read_bytes() if path.is_file() else None)
        for path in below.rglob("*")
    }


AWKWARD = ["a b", "it's", '"', "$HOME", "*", "[x]?", "a\\b", "-r", "ü", "a\nb", "a:b", "~", "{a,b}"]


@pytest.mark.usefixtures("guest")
@pytest.mark.parametrize("name", AWKWARD)
async def test_names_are_names(ovm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And neither patterns nor options, on either side, to a path from / or from here."""
    for directory in ("here", "there", "back"):
        (tmp_path / directory).mkdir()
    (tmp_path / "here" / name).write_text(name)
    (tmp_path / "there" / "decoy").write_text("not this one")
    monkeypatch.chdir(tmp_path / "here")
    local = f"./{name}" if ":" in name or name.startswith("-") else name
    for argv in (
        (local, f"default:{tmp_path}/there/{name}"),
        (f"default:{tmp_path}/there/{name}", str(tmp_path / "back") + "/"),
    ):
        assert await ovm("cp", *argv) == (0, b"", "")
    assert [path.name for path in (tmp_path / "back").iterdir()] == [name]
    assert (tmp_path / "back" / name).read_text() == name


@pytest.mark.usefixtures("guest")
async def test_what_is_not_there(ovm: Run, tmp_path: Path) -> None:
    """scp's own words and status."""
    status, _, err = await ovm("cp", f"default:{tmp_path}/nothing", str(tmp_path))
    assert status == 1
    assert "nothing" in err


# --- what cannot be


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("verb", [("ssh", "NAME"), ("exec", "NAME", "--", "true"), ("cp", "NAME:a", "b")])
async def test_a_machine_that_does_not_run(ovm: Run, verb: tuple[str, ...]) -> None:
    """It is an error that says what to do, and one that was never made is called so."""
    for name, words in (("default", "default is not running"), ("other", "there is no machine called other")):
        status, out, err = await ovm(*(word.replace("NAME", name) for word in verb))
        assert (status, out) == (1, b"")
        assert words in err
        assert "hint: " in err


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("forwards", [b"[]", b"{}", b"[", b"\xff", b'[{"remote": "192.168.127.2:22"}]', b"[" * 99_999])
async def test_a_gvproxy_that_does_not_know(ovm: Run, forwards: bytes) -> None:
    """Whatever it says instead, the guest cannot be reached."""
    async with gvproxy("default", forwards):
        status, _, err = await ovm("exec", "--", "true")
    assert status == 1
    assert "default is not running" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("exec",), "ovm exec -- uname -a"),
        (("exec", "dev", "ls"), "after --: ovm exec dev -- ls"),
        (("ssh", "dev", "ls", "x"), "after --: ovm ssh dev -- ls x"),
        (("exec", "dev", "ls", "-a"), "put a guest command and its options after --"),
        (("cp", "a", "b"), "NAME:PATH"),
        (("cp", "a:x", "b:x"), "NAME:PATH"),
        (("cp", "./a:x", "/b:x"), "NAME:PATH"),
    ],
)
async def test_usage(ovm: Run, args: tuple[str, ...], words: str) -> None:
    """What was left out is said, with status 2."""
    status, out, err = await ovm(*args)
    assert (status, out) == (2, b"")
    assert words in err


@pytest.mark.usefixtures("home")
async def test_without_ssh(ovm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """How to come by it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = await ovm("ssh")
    assert status == 1
    assert "ssh is not installed" in err
    assert "openssh-client" in err
