"""Helpers: spawned clean, ended for certain, and their end told in words."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys

import pytest

from ovm.errors import HelperError, HelperExited, StartError, StopError
from ovm.process import child, lock
from ovm.process.child import process_group

STUBBORN = "trap '' TERM; echo deaf; while :; do read -r line || exec sleep 60; done"


async def wait_for_text(path, text: str) -> None:
    """Until ``text`` stands in the log at ``path``."""
    async with asyncio.timeout(5):
        while text not in path.read_text():
            await asyncio.sleep(0.002)


async def test_output_goes_to_the_log(group, tmp_path):
    """What a helper says on either output is in its log, behind what was there, and it reads nothing."""
    log = tmp_path / "helper.log"
    log.write_text("before\n")
    helper = await group.spawn("helper", ["sh", "-c", "echo out; echo err >&2; cat"], log_path=log)
    assert await helper.wait() == "exit status 0"
    assert log.read_text() == "before\nout\nerr\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "exit status 0"),
        ("exit 3", "exit status 3"),
        ("kill -KILL $$", "killed by SIGKILL"),
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("kill -40 $$", "killed by signal 40"),
    ],
)
async def test_how_it_ended_is_told_in_words(group, tmp_path, script, reason):
    """The exit reason is the status, or the signal by its name."""
    helper = await group.spawn("helper", ["sh", "-c", script], log_path=tmp_path / "log")
    assert await helper.wait() == reason
    assert not helper.running


@pytest.mark.skipif(sys.platform == "darwin", reason="there is no way there to look without reaping")
def test_a_signal_that_comes_too_late_changes_nothing(tmp_path):
    """Who has ended, and was not waited for yet, keeps the status it ended with."""

    async def main():
        if sys.version_info < (3, 12):  # whose own watcher waits in a thread, and is mostly quicker
            watcher = asyncio.PidfdChildWatcher()
            watcher.attach_loop(asyncio.get_running_loop())
            asyncio.set_child_watcher(watcher)
        async with process_group([], log_path=tmp_path / "guard.log") as group:
            os.mkfifo(tmp_path / "fifo")
            argv = ["sh", "-c", "read -r _ <$1; exit 3", "sh", tmp_path / "fifo"]
            helper = await group.spawn("helper", argv, log_path=tmp_path / "log")
            (tmp_path / "fifo").write_text("go\n")  # from here on the event loop has no turn in which to notice
            os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)
            helper.kill()
            assert await helper.wait() == "exit status 3"

    try:
        asyncio.run(main())
    finally:
        if sys.version_info < (3, 12):
            asyncio.set_child_watcher(None)


async def test_while_it_runs_there_is_no_reason(group, tmp_path):
    """A running helper has no exit reason yet."""
    helper = await group.spawn("helper", ["sleep", "60"], log_path=tmp_path / "log")
    assert helper.running
    assert helper.exit_reason == ""
    await helper.end()


async def test_the_error_shows_the_last_words(group, tmp_path):
    """A helper's unexpected end carries its name, stage, exit and the tail of its log."""
    log = tmp_path / "gvproxy.log"
    helper = await group.spawn("gvproxy", ["sh", "-c", "echo one; echo cannot bind; exit 1"], log_path=log)
    await helper.wait()
    error = await helper.exited("network")
    assert isinstance(error, HelperExited)
    assert (error.message, error.stage) == ("gvproxy ended unexpectedly", "network")
    assert error.exit_reason == "exit status 1"
    assert error.log_tail == ("one", "cannot bind")
    assert str(log) in error.hint


async def test_end_asks_first(group, tmp_path):
    """A helper that heeds SIGTERM ends in its own way."""
    log = tmp_path / "log"
    script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    helper = await group.spawn("helper", ["sh", "-c", script], log_path=log)
    await wait_for_text(log, "up")
    await helper.end(grace_s=5)
    assert helper.expected
    assert helper.exit_reason == "exit status 0"
    assert log.read_text() == "up\nbye\n"


@pytest.mark.parametrize("grace", [0, 0.03])
async def test_end_kills_what_does_not_listen(group, tmp_path, grace):
    """A helper that ignores SIGTERM is killed after the grace."""
    log = tmp_path / "log"
    helper = await group.spawn("helper", ["sh", "-c", STUBBORN], log_path=log)
    await wait_for_text(log, "deaf")
    await helper.end(grace_s=grace)
    assert helper.exit_reason == "killed by SIGKILL"


async def test_ending_twice_is_fine(group, tmp_path):
    """Ending what has ended does nothing, and signals no stranger who got its pid."""
    helper = await group.spawn("helper", ["true"], log_path=tmp_path / "log")
    await helper.wait()
    await helper.end()
    await helper.end()
    assert helper.exit_reason == "exit status 0"


async def test_a_stopped_helper_is_ended_too(group, tmp_path):
    """A helper stopped by SIGSTOP, which hears no SIGTERM, is killed."""
    helper = await group.spawn("helper", ["sleep", "60"], log_path=tmp_path / "log")
    os.kill(helper.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, helper.pid, os.WSTOPPED | os.WNOWAIT)
    await helper.end(grace_s=0.03)
    assert helper.exit_reason == "killed by SIGKILL"


@pytest.mark.parametrize("kind", ["missing", "not executable", "no program"])
async def test_what_cannot_be_run_is_a_helper_error(group, tmp_path, kind):
    """A program that cannot be executed is a HelperError that names it."""
    program = tmp_path / "program"
    if kind != "missing":
        program.write_bytes(b"\x7fELF rubbish")
        program.chmod(0o755 if kind == "no program" else 0o644)
    with pytest.raises(HelperError, match="gvproxy cannot be started") as caught:
        await group.spawn("gvproxy", [program], log_path=tmp_path / "log")
    assert str(program) in caught.value.hint


async def test_a_helper_starts_clean(tmp_path, monkeypatch):
    """A helper sees none of the user's environment but what it needs, umask 077, no file of ours but the lock."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("LD_PRELOAD", "")
    leak = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(leak, True)
    tell = (
        "import json, os; mask = os.umask(0); "
        "fds = [int(fd) for fd in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + fd)];"
        "print(json.dumps([dict(os.environ), mask, sorted(fds), os.getpgrp(), os.getcwd()]))"
    )
    log = tmp_path / "log"
    try:
        async with (
            lock.hold([tmp_path], wait_s=0) as held,
            process_group(held.fds, log_path=tmp_path / "guard.log") as group,
        ):
            argv = [sys.executable, "-I", "-S", "-c", tell]
            helper = await group.spawn("helper", argv, log_path=log, cwd=tmp_path)
            assert await helper.wait() == "exit status 0", log.read_text()
            environment, umask, fds, process_group_id, cwd = json.loads(log.read_text())
            assert set(environment) <= {"PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE"}
            assert umask == 0o077
            assert fds == sorted([0, 1, 2, *held.fds])
            assert process_group_id == group.guard.pid
            assert cwd == str(tmp_path)
    finally:
        os.close(leak)


async def test_leaving_the_group_ends_everything_in_it(tmp_path):
    """After the block nothing of the group is left, however deaf, nor what a helper had started itself."""
    log = tmp_path / "log"
    async with process_group([], log_path=tmp_path / "guard.log") as group:
        script = f"({STUBBORN}) & echo $!; wait"
        helper = await group.spawn("helper", ["sh", "-c", script], log_path=log)
        async with asyncio.timeout(5):
            while len(words := log.read_text().split()) < 2:
                await asyncio.sleep(0.002)
        grandchild = os.pidfd_open(next(int(word) for word in words if word.isdigit()))
    async with asyncio.timeout(5):
        assert await helper.wait() == "killed by SIGKILL"
    assert select.select([grandchild], [], [], 5)[0]
    os.close(grandchild)


async def test_a_guard_that_fails_is_told_with_its_words(tmp_path, monkeypatch):
    """A guard that cannot do its work is a start error with its last words."""
    script = "import sys; print('no pidfd here', file=sys.stderr); sys.exit(7)"
    monkeypatch.setattr(child, "guard_command", lambda _pid: [sys.executable, "-I", "-S", "-c", script])
    with pytest.raises(StartError) as caught:
        async with process_group([], log_path=tmp_path / "guard.log"):
            pass
    assert (caught.value.stage, caught.value.exit_reason) == ("guard", "exit status 7")
    assert caught.value.log_tail == ("no pidfd here",)


async def test_a_silent_guard_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """A guard that says nothing is given up after its deadline, and ended."""
    monkeypatch.setattr(child, "guard_command", lambda _pid: ["sleep", "60"])
    monkeypatch.setattr(child, "GUARD_START_S", 0.05)
    with pytest.raises(StartError, match="did not start"):
        async with process_group([], log_path=tmp_path / "guard.log"):
            pass


async def test_killing_a_group_twice_is_safe(tmp_path):
    """``kill`` may be called at any time, and afterwards signals nobody."""
    async with process_group([], log_path=tmp_path / "guard.log") as group:
        group.kill()
        await group.guard.wait()
        group.kill()
    assert group.guard.exit_reason == "killed by SIGKILL"


def test_extra_variables_are_added(monkeypatch):
    """What a helper needs besides can be given to it."""
    monkeypatch.setenv("PATH", "/bin")
    assert child.clean_environment({"A": "1"})["A"] == "1"
    assert child.clean_environment()["PATH"] == "/bin"


@pytest.fixture
def unreaped(monkeypatch):
    """The kernel releases no killed guard within its deadline: its end is not noticed before the test is over."""
    execute = child._execute

    async def execute_guard(name, *arguments, **options):
        process = await execute(name, *arguments, **options)
        if name == "guard":
            noticed = process.wait
            monkeypatch.setattr(process, "wait", asyncio.Event().wait)
            noticing.append(noticed)
        return process

    noticing = []
    monkeypatch.setattr(child, "_execute", execute_guard)
    monkeypatch.setattr(child, "KILL_GRACE_S", 0.02)
    return noticing


async def test_a_guard_that_is_not_reaped_does_not_hide_the_first_error(tmp_path, unreaped):
    """The first error is raised, with a note about the guard that was not reaped in time."""
    with pytest.raises(StartError, match="no gvproxy") as caught:
        async with process_group([], log_path=tmp_path / "guard.log"):
            raise StartError("no gvproxy")
    assert "guard (process" in caught.value.__notes__[0]
    await unreaped[0]()


async def test_a_guard_that_is_not_reaped_is_an_error_of_the_stop(tmp_path, unreaped):
    """Without an earlier error it is a StopError that names the guard, and nobody follows the guard any more."""
    with pytest.raises(StopError, match=r"guard \(process \d+\) was killed but still exists after"):
        async with process_group([], log_path=tmp_path / "guard.log"):
            pass
    assert [task for task in asyncio.all_tasks() if task.get_name() == "guard's end"] == []
    await unreaped[0]()


async def test_the_cleanup_of_what_failed_does_not_hide_why():
    """An error on the way out is a note of the error that came before it."""

    async def end():
        raise StopError("qemu is still there")

    with pytest.raises(StartError, match="no QMP") as caught:
        async with child.at_last(end):
            raise StartError("no QMP")
    assert caught.value.__notes__ == ["Then the cleanup failed too: qemu is still there"]
