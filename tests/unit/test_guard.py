"""The guard: when the manager is gone, however it went, so is everything it had started."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ovm.process import guard
from ovm.process.child import guard_command

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
        watched = {}
        try:
            told = json.loads(process.stdout.readline())
            watched = {"guard": os.pidfd_open(told["guard"])}
            watched |= {f"helper {n}": os.pidfd_open(pid) for n, pid in enumerate(told["helpers"])}
            if "forked" in told:
                watched["forked"] = os.pidfd_open(told["forked"])
            yield process, watched
        finally:
            process.kill()
            for fd in watched.values():
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                os.close(fd)


def gone_within(seconds: float, *pidfds: int) -> bool:
    """Whether all those processes have ended within ``seconds``."""
    deadline = time.monotonic() + seconds
    return all(select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0] for fd in pidfds)


def still_there(*pidfds: int) -> bool:
    return not select.select(pidfds, [], [], 0)[0]


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
    assert "a process group of its own" in done.stderr


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
