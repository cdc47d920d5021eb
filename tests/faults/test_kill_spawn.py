"""The manager is killed while a helper is being started: held by ptrace between its fork and its first step."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest

import processes
from adopted import adopting, below

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process at its very beginning")

MANAGER = """
import asyncio, sys
from pathlib import Path
from ovm.process.child import process_group

async def main():
    here = Path(sys.argv[1])
    async with process_group([], log_path=here / "guard.log") as group:
        print(group.guard.pid, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await group.spawn("helper", ["sleep", "60"], log_path=here / "log")
        await asyncio.sleep(60)

asyncio.run(main())
"""
PTRACE_DETACH, PTRACE_SEIZE = 17, 0x4206
TRACE_FORKS = 1 << 1 | 1 << 2
"""PTRACE_O_TRACEFORK and _TRACEVFORK: a child is stopped before it has done anything."""
WALL = 0x40000000
"""__WALL: waitpid() tells of the stops of whatever is traced."""
STARTED_S = 20.0
GONE_S = 2.0


def ptrace(request: int, pid: int, data: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(request, pid, None, data) < 0:
        pytest.skip(f"ptrace is not allowed: {os.strerror(ctypes.get_errno())}")


def dead(pid: int) -> None:
    """Until a child, own or adopted, has ended; it stays a zombie."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_helper_that_is_not_in_the_group_yet(tmp_path, reaped):
    """One that joins when all in it have been killed is ended too; when there is no group any more, it ends itself."""
    argv = [sys.executable, "-W", "ignore", "-c", MANAGER, tmp_path]
    with adopting() as adopted, subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as manager:
        try:
            guard = int(manager.stdout.readline())
            ptrace(PTRACE_SEIZE, manager.pid, TRACE_FORKS)
            manager.stdin.write(b"\n")
            manager.stdin.flush()
            deadline = time.monotonic() + STARTED_S
            while not (born := set(below(manager.pid)) - {guard}):
                assert time.monotonic() < deadline
            (helper,) = born
            os.kill(manager.pid, signal.SIGKILL)  # Popen would take the stop for the end
            os.waitpid(helper, WALL)
            dead(manager.pid)
            dead(guard)
            if reaped:
                while guard in adopted.left():
                    time.sleep(0.01)
            ptrace(PTRACE_DETACH, helper)
            deadline = time.monotonic() + GONE_S
            while (left := adopted.left()) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert left == [], [processes.command(pid) for pid in left]
        finally:
            for pid in adopted.left():
                os.kill(pid, signal.SIGKILL)
