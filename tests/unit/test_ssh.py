"""The way into the guest, against a real ssh server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket

import asyncssh
import pytest

from ovm.errors import ExecTimeout, GuestError, HostKeyMismatch
from ovm.guest import ssh as ssh_module
from ovm.guest.ssh import SSH, make_keys
from ovm.paths import KeyPaths, public


async def test_a_command_is_run(ssh):
    """Both outputs and the status come back, and a status other than 0 is no error."""
    result = await ssh.exec(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.exit_status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert result.text == "out"


@pytest.mark.parametrize("word", ["", " ", "a b", "'", '"', "$HOME", "a\nb", "*", "\\", "ü→", "-n", "`id`", "!x", ";"])
async def test_arguments_arrive_as_they_were_given(ssh, word):
    """No shell on the way changes an argument."""
    result = await ssh.exec(["printf", "%s|", word, "end"])
    assert result.stdout == f"{word}|end|".encode()


async def test_variables_are_added(ssh):
    """A command sees the given variables, whatever is in them, besides those it has anyway."""
    environment = {"A": "x y", "B": "it's", "C": ""}
    result = await ssh.exec(["sh", "-c", 'echo "$A|$B|${C-unset}|${PATH:+path}"'], environment=environment)
    assert result.text == "x y|it's||path"


async def test_a_signal_is_told_as_a_shell_would(ssh):
    """A command ended by a signal has the status 128 and its number."""
    assert (await ssh.exec(["sh", "-c", "kill -TERM $$"])).exit_status == 128 + signal.SIGTERM


async def test_a_command_reads_what_it_is_given(ssh):
    """Standard input arrives whole, binary and large, and then ends."""
    given = os.urandom(300_000)
    assert (await ssh.exec(["cat"], stdin=given)).stdout == given


async def test_a_command_that_does_not_read_is_fine(ssh):
    """Input that nobody reads does no harm."""
    assert (await ssh.exec(["true"], stdin=b"x" * 300_000)).exit_status == 0


async def test_no_input_ends_at_once(ssh):
    """Without input a command reads an end of file, and does not wait for a terminal."""
    async with asyncio.timeout(5):
        assert (await ssh.exec(["cat"])).stdout == b""


async def test_output_can_be_had_as_it_comes(ssh):
    """With callbacks the output arrives piece by piece while the command runs, and is not collected."""
    pieces, first = [], asyncio.Event()

    def heard(piece: bytes) -> None:
        pieces.append(piece)
        first.set()

    fifo_free = "echo one; read -r go; echo two; echo err >&2"
    errors: list[bytes] = []
    async with asyncio.timeout(5):
        result = await ssh.exec(["sh", "-c", fifo_free], stdin=b"go\n", on_stdout=heard, on_stderr=errors.append)
    assert first.is_set()
    assert b"".join(pieces) == b"one\ntwo\n"
    assert b"".join(errors) == b"err\n"
    assert (result.stdout, result.stderr) == (b"", b"")


async def test_a_failing_callback_is_the_callers(ssh):
    """What a callback raises reaches the caller as it is, and the connection stays usable."""

    def fail(_piece: bytes) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ssh.exec(["echo", "x"], on_stdout=fail)
    assert (await ssh.exec(["echo", "y"])).text == "y"


async def test_a_process_can_be_talked_to(ssh):
    """A process has its streams while it runs, and is ended when it is left."""
    async with ssh.process(["sh", "-c", "echo $$; exec cat"]) as process:
        pid = int(await process.stdout.readline())
        process.stdin.write(b"hello\n")
        assert await process.stdout.readline() == b"hello\n"
        watch = os.pidfd_open(pid)
    await until_gone(watch)


async def test_a_command_that_runs_too_long_is_ended(ssh, tmp_path):
    """At its deadline a command is ended in the guest, and the error says how long it was given."""
    pid_file = tmp_path / "pid"
    script = f"echo $$ > {shlex.quote(str(pid_file))}; exec sleep 60"
    for given in (0.1, 1, 10):  # a busy machine may need more time to begin
        with pytest.raises(ExecTimeout, match=f"ran longer than {given:g} s"):
            await ssh.exec(["sh", "-c", script], timeout_s=given)
        if pid_file.exists() and pid_file.read_text():
            break
    try:
        watch = os.pidfd_open(int(pid_file.read_text()))
    except ProcessLookupError:
        return  # gone and forgotten already
    await until_gone(watch)


async def until_gone(watch: int) -> None:
    """Until the process behind a pidfd has ended."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(watch, gone.set)
    async with asyncio.timeout(5):
        await gone.wait()
    loop.remove_reader(watch)
    os.close(watch)


async def test_the_deadline_counts_from_the_call(sshd, ssh, monkeypatch):
    """A guest that takes the connection but starts nothing is given up at the deadline too."""
    monkeypatch.setattr(ssh_module, "CLOSE_TIMEOUT_S", 0.02)
    await ssh.connect()

    async def never(*_args):
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncssh.SSHServerChannel, "_finish_open_request", never)
    async with asyncio.timeout(5):
        with pytest.raises(ExecTimeout):
            await ssh.exec(["true"], timeout_s=0.05)


async def test_one_connection_serves_everybody(sshd, ssh):
    """Commands at the same time share one connection."""
    results = await asyncio.gather(*(ssh.exec(["echo", str(n)]) for n in range(5)))
    assert [result.text for result in results] == list("01234")
    assert len(sshd.connections) == 1


async def test_a_lost_connection_is_made_anew(sshd, ssh):
    """After the connection was lost, the next command connects again, and what follows a connect is done again."""
    connects = []

    async def note(_ssh: SSH) -> None:
        connects.append(1)

    ssh.on_connect(note)
    assert (await ssh.exec(["echo", "1"])).text == "1"
    sshd.connections[0].abort()
    async with asyncio.timeout(5):
        while not (await ssh.connect()).is_closed() and len(sshd.connections) == 1:
            await asyncio.sleep(0)
    assert (await ssh.exec(["echo", "2"])).text == "2"
    assert len(sshd.connections) == len(connects) == 2


async def test_a_connection_lost_meanwhile_is_told(sshd, ssh):
    """A command whose connection is lost is a GuestError, not a status."""
    running = asyncio.Event()
    task = asyncio.create_task(ssh.exec(["sh", "-c", "echo up; exec sleep 60"], on_stdout=lambda _: running.set()))
    async with asyncio.timeout(5):
        await running.wait()
        sshd.connections[0].abort()
        with pytest.raises(GuestError, match="connection"):
            await task


async def test_what_must_follow_a_connect_is_part_of_it(sshd, ssh):
    """If what is to be done after a connect fails, the call fails, and the next one does it again."""
    tries = []

    async def fail_once(_ssh: SSH) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise GuestError("not yet")

    ssh.on_connect(fail_once)
    with pytest.raises(GuestError, match="not yet"):
        await ssh.exec(["true"])
    assert (await ssh.exec(["echo", "x"])).text == "x"
    assert len(tries) == 2


async def test_another_host_key_is_refused(sshd, tmp_path):
    """A server with a host key other than the pinned one gets nothing from us, not even our user name's key."""
    other = KeyPaths(tmp_path / "other")
    make_keys(other)
    client = sshd.client(other)
    with pytest.raises(HostKeyMismatch, match="does not have this guest's host key"):
        await client.exec(["true"])
    assert sshd.commands == []


async def test_a_refused_key_says_what_to_do(sshd, tmp_path):
    """A guest that does not take our key is a GuestError with advice."""
    other = KeyPaths(tmp_path / "other")
    make_keys(other)
    for path in (sshd.keys.host_key, public(sshd.keys.host_key)):
        (other.directory / path.name).write_bytes(path.read_bytes())
    with pytest.raises(GuestError, match="rejected the ssh key of ovm for root") as caught:
        await sshd.client(other).exec(["true"])
    assert "restart the machine" in caught.value.hint


async def test_nobody_there_is_a_guest_error(guest_keys):
    """A port on which nobody listens is a GuestError."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(GuestError, match="no ssh connection to the guest"):
            await SSH(bound.getsockname()[1], guest_keys).connect()


async def test_a_silent_port_is_given_up(guest_keys):
    """A port that accepts and says nothing, as gvproxy's does before the guest is up, is given up at the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(GuestError, match=r"within 0\.05 s"):
            await SSH(silent.getsockname()[1], guest_keys).connect(timeout_s=0.05)


async def test_the_users_own_ssh_plays_no_part(sshd, ssh, tmp_path, monkeypatch):
    """The user's ssh configuration, known hosts and agent change nothing and are not asked."""
    configuration = tmp_path / ".ssh"
    configuration.mkdir(mode=0o700)
    (configuration / "config").write_text("Host *\n  Port 1\n  User nobody\n  ProxyCommand false\n")
    (configuration / "known_hosts").write_text("* ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAA\n")
    asked = []
    agent = await asyncio.start_unix_server(lambda _r, w: (asked.append(1), w.close()), tmp_path / "agent")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    assert (await ssh.exec(["echo", "x"])).text == "x"
    agent.close()
    assert asked == []
    assert sshd.connections[0].get_extra_info("username") == "root"


async def test_after_hanging_up_it_connects_again(ssh):
    """``close`` hangs up, twice if need be, and a later command connects anew."""
    await ssh.exec(["true"])
    await ssh.close()
    await ssh.close()
    assert (await ssh.exec(["echo", "x"])).text == "x"


async def test_connections_made_in_the_guest_are_served(ssh, unused_port):
    """What connects to a port of the guest's loopback talks to our handler, which learns where it came from."""
    came_from = []

    async def answer(reader, writer, from_port):
        came_from.append(from_port)
        writer.write((await reader.readline()).upper())
        writer.close()

    await ssh.connect()
    await ssh.listen_in_guest(unused_port, answer, release=["true"])
    reader, writer = await asyncio.open_connection("127.0.0.1", unused_port)
    ours = writer.get_extra_info("sockname")[1]
    writer.write(b"hello\n")
    assert await reader.read() == b"HELLO\n"
    assert came_from == [ours]
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_a_guest_may_refuse_to_listen(sshd, ssh, unused_port):
    """A guest that does not allow the forward is a GuestError that names the port."""
    sshd.may_listen = False
    await ssh.connect()
    with pytest.raises(GuestError, match=f"listen on the guest's port {unused_port}"):
        await ssh.listen_in_guest(unused_port, None, release=["true"])


async def test_a_socket_is_lent(ssh, short_path):
    """What connects to the guest's path talks to the host's socket, after a lost connection too."""

    async def answer(reader, writer):
        writer.write((await reader.readline()).upper())
        writer.close()

    async def ask() -> bytes:
        reader, writer = await asyncio.open_unix_connection(lent)
        with contextlib.closing(writer):
            writer.write(b"hello\n")
            return await reader.read()

    ours, lent = short_path / "ours.sock", short_path / "lent.sock"
    ssh.lend_socket(ours, str(lent))
    await ssh.connect()
    async with await asyncio.start_unix_server(answer, ours):
        assert await ask() == b"HELLO\n"
        await ssh.close()
        await ssh.connect()
        assert await ask() == b"HELLO\n"
    ours.unlink(missing_ok=True)
    with contextlib.suppress(ConnectionError):
        assert await ask() == b"", "nobody answers in its place"
    assert (await ssh.exec(["echo", "x"])).text == "x", "and nothing else suffers"


async def test_a_guest_may_refuse_to_take_a_socket(sshd, ssh, short_path):
    """Then there is no connection: it would be one without what was asked for."""
    sshd.may_listen = False
    ssh.lend_socket(short_path / "ours.sock", "/lent.sock")
    with pytest.raises(GuestError, match="listen on the guest's /lent"):
        await ssh.connect()
