"""The guard: when the manager is gone, however it went, so is everything it had started."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import ovm
from ovm.process import guard
from ovm.process.child import guard_command, guard_environment, users_environment
from watched import gone_within, still_there, watching

MANAGER = """
import asyncio, json, os, sys, threading
from pathlib import Path
from ovm.process.child import process_group

async def main():
    here = Path(sys.argv[1])
    async with process_group([], log_path=here / "guard.log") as group:
        deaf = ["sh", "-c", "trap '' TERM HUP INT QUIT; echo up; exec sleep 60"]
        helpers = [await group.spawn(f"h{n}", deaf, log_path=here / f"h{n}.log") for n in range(2)]
        while not all((here / f"h{n}.log").read_text() for n in range(2)):
            await asyncio.sleep(0.002)
        told = {"guard": group.guard.pid, "helpers": [h.pid for h in helpers]}
        if "fork" in sys.argv:  # a child that holds everything we hold, pipes and all
            told["forked"] = os.fork()
            if not told["forked"]:
                import time
                time.sleep(60)
                os._exit(0)
        print(json.dumps(told), flush=True)
        await asyncio.sleep(60)

run = lambda: asyncio.run(main())
if "thread" in sys.argv:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
else:
    run()
"""


@contextmanager
def manager(tmp_path, *how: str):
    """A manager in a process of its own; yields it, and the pidfds of what it tells."""
    argv = [sys.executable, "-W", "ignore", "-c", MANAGER, str(tmp_path), *how]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            told = json.loads(process.stdout.readline())
            pids = {"guard": told["guard"]} | {f"helper {n}": pid for n, pid in enumerate(told["helpers"])}
            if "forked" in told:
                pids["forked"] = told["forked"]
            with watching(pids) as watched:
                yield process, watched
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["", "thread"])
def test_a_killed_manager_takes_its_helpers_along(tmp_path, how):
    """After SIGKILL of the manager, run in its main thread or another, guard and helpers are gone within 2 s."""
    with manager(tmp_path, how) as (process, watched):
        assert still_there(*watched.values())
        process.kill()
        assert gone_within(2, *watched.values())


def test_a_forked_child_does_not_fool_the_guard(tmp_path):
    """The helpers end with the manager even while a child that it had forked lives and holds all its files."""
    with manager(tmp_path, "fork") as (process, watched):
        forked = watched["forked"]
        process.kill()
        assert gone_within(2, *(fd for name, fd in watched.items() if name != "forked"))
        assert still_there(forked)


def test_a_guard_that_is_told_to_end_ends_the_group(tmp_path):
    """SIGTERM to the guard ends every helper, as a system going down does it."""
    with manager(tmp_path) as (_, watched):
        signal.pidfd_send_signal(watched["guard"], signal.SIGTERM)
        assert gone_within(2, *watched.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP])
def test_the_guard_heeds_no_key_of_the_terminal(number):
    """Ctrl-C, Ctrl-\\, Ctrl-Z and a hang-up leave the guard as it is."""
    with subprocess.Popen(guard_command(os.getpid()), stdout=subprocess.PIPE, process_group=0) as process:
        try:
            assert process.stdout.readline() == guard.WATCHING
            process.send_signal(number)
            ignored = Path(f"/proc/{process.pid}/status").read_text().partition("SigIgn:")[2].split()[0]
            assert int(ignored, 16) & 1 << (number - 1)
            assert process.poll() is None
        finally:
            process.kill()


async def test_ctrl_c_reaches_the_manager_alone(group, tmp_path):
    """Helpers are not in the manager's process group, which is what a terminal signals."""
    helper = await group.spawn("helper", ["sleep", "60"], log_path=tmp_path / "log")
    assert os.getpgid(helper.pid) == os.getpgid(group.guard.pid) == group.guard.pid
    assert group.guard.pid != os.getpgrp()
    await helper.end()


def test_ctrl_c_to_the_foreground_group_lets_the_manager_clean_up(tmp_path):
    """SIGINT to the manager's group ends the manager in its own way; afterwards nothing is left."""
    with manager(tmp_path) as (process, watched):
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(5) != -signal.SIGKILL
        assert gone_within(2, *watched.values())


def test_the_guard_needs_nothing_but_itself(tmp_path):
    """The guard starts in any directory and environment, whatever lies there under the standard library's names."""
    for name in ("os", "signal", "select", "typing", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken in')")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nonexistent"}
    with subprocess.Popen(
        guard_command(os.getpid()), stdout=subprocess.PIPE, process_group=0, cwd=tmp_path, env=environment
    ) as process:
        try:
            assert process.stdout.readline() == guard.WATCHING
        finally:
            process.kill()


def test_a_guard_without_a_group_of_its_own_refuses():
    """Started by hand, the guard does not get to kill its caller's process group."""
    done = subprocess.run(guard_command(os.getpid()), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "its own process group" in done.stderr


def test_a_guard_whose_manager_is_gone_already_ends(tmp_path):
    """A manager that dies before the guard looks is noticed: by its pid being free, or somebody else's."""
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        done = subprocess.run(
            guard_command(stranger.pid), capture_output=True, process_group=0, check=False, timeout=10
        )
    finally:
        stranger.kill()
        stranger.wait()
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


async def test_a_dead_guard_lets_no_helper_start(group, tmp_path):
    """Without its guard no helper is started unguarded."""
    from ovm.errors import HelperError

    os.kill(group.guard.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        await group.guard.wait()
    with pytest.raises(HelperError):
        await group.spawn("helper", ["sleep", "60"], log_path=tmp_path / "log")


OLD_PYTHON = "import os, sys; del os.pidfd_open; from ovm.process.guard import watch; watch(int(sys.argv[1]))"


def test_a_python_without_pidfds_guards_as_well(tmp_path):
    """Some Pythons are built on systems older than any kernel with pidfds; the kernel they run on has them."""
    code = (
        "import os, subprocess, sys, time;"
        "argv = [sys.executable, '-W', 'ignore', '-c', sys.argv[1], str(os.getpid())];"
        "guard = subprocess.Popen(argv, stdout=subprocess.PIPE, process_group=0);"
        "print(guard.pid, guard.stdout.readline().decode(), end='', flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-W", "ignore", "-c", code, OLD_PYTHON]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as manager:
        try:
            pid, word = manager.stdout.readline().split(maxsplit=1)
            assert word == guard.WATCHING
            with watching({"guard": int(pid)}) as watched:
                assert still_there(watched["guard"])
                manager.kill()
                assert gone_within(2, watched["guard"])
        finally:
            manager.kill()


def test_a_python_without_pidfds_notices_a_manager_that_is_gone():
    """That it cannot be opened any more ends the guard, as with pidfds."""
    with subprocess.Popen(["true"]) as gone:
        pass
    argv = [sys.executable, "-W", "ignore", "-c", OLD_PYTHON, str(gone.pid)]
    done = subprocess.run(argv, capture_output=True, process_group=0, check=False, timeout=10)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


# Frozen apps; tests/e2e/test_frozen.py has real ones


@pytest.fixture
def frozen(monkeypatch):
    """This process taken for a frozen app, started as ``app --ovm-guard PID``; nobody has called freeze_support."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/app")
    monkeypatch.setattr(sys, "argv", ["/app", guard.ARGUMENT, "17"])
    monkeypatch.setattr(guard, "_supported", False)
    watched = []
    monkeypatch.setattr(guard, "watch", watched.append)
    return watched


def test_a_frozen_app_is_its_own_guard(frozen):
    """It is started with the reserved argument, and then watches instead of doing what apps do."""
    ovm.freeze_support()
    assert frozen == [17]
    assert guard_command(17) == ["/app", guard.ARGUMENT, "17"]


def test_a_frozen_app_without_support_is_not_started_again(frozen):
    """An app that knows nothing of the argument would open a second window, and a third from there."""
    with pytest.raises(ovm.StartError, match="cannot be its own guard") as caught:
        guard_command(17)
    assert "ovm.freeze_support()" in caught.value.hint


@pytest.mark.parametrize("argv", [["/app"], ["/app", "17"], ["/app", guard.ARGUMENT], ["/app", "run", guard.ARGUMENT]])
def test_a_frozen_app_that_was_not_asked_goes_on(frozen, monkeypatch, argv):
    """Any other arguments are the app's."""
    monkeypatch.setattr(sys, "argv", argv)
    ovm.freeze_support()
    assert frozen == []


def test_freeze_support_is_for_frozen_apps_only(frozen, monkeypatch):
    """In an ordinary Python the argument means nothing, and Python runs the guard."""
    monkeypatch.delattr(sys, "frozen")
    ovm.freeze_support()
    assert frozen == []
    assert guard_command(17)[-2:] == [guard.__file__, "17"]


def test_py2app_is_started_by_its_own_name(frozen, monkeypatch):
    """There sys.executable is an interpreter that knows nothing of the app."""
    monkeypatch.setattr(sys, "frozen", "macosx_app")
    monkeypatch.setenv("EXECUTABLEPATH", "/A.app/Contents/MacOS/A")
    ovm.freeze_support()
    assert guard_command(17)[0] == "/A.app/Contents/MacOS/A"


def test_a_frozen_apps_libraries_are_for_itself(frozen, monkeypatch):
    """Its guard finds them, the system's programs get the user's own, and helpers none."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/tmp/_MEI1:/the/user's")
    monkeypatch.setenv("LD_LIBRARY_PATH_ORIG", "/the/user's")
    monkeypatch.setenv("_PYI_APPLICATION_HOME_DIR", "/tmp/_MEI1")
    monkeypatch.setenv("SECRET", "of the user")
    assert guard_environment()["LD_LIBRARY_PATH"] == "/tmp/_MEI1:/the/user's"
    assert guard_environment()["_PYI_APPLICATION_HOME_DIR"] == "/tmp/_MEI1"
    assert "SECRET" not in guard_environment()
    assert users_environment()["LD_LIBRARY_PATH"] == "/the/user's"
    monkeypatch.delenv("LD_LIBRARY_PATH_ORIG")
    assert "LD_LIBRARY_PATH" not in users_environment()


def test_the_users_libraries_are_kept_in_an_ordinary_python(monkeypatch):
    """Only what a loader has put there is taken away; and a guard needs none of it."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/the/user's")
    assert users_environment()["LD_LIBRARY_PATH"] == "/the/user's"
    assert "LD_LIBRARY_PATH" not in guard_environment()
