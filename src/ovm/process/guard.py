"""The guard: a small process that ends every helper when the manager is gone.

It leads a process group, every helper is spawned into that group, and it watches the manager through a
pidfd (Linux) or kqueue (macOS): a pipe's end-of-file would be kept open by the manager's own forked
children, and a bare pid may be reused. When the manager dies, however it dies, the group is killed at once.

Run as a program (``python guard.py PID``) it is the guard. It imports the standard library alone and is
started by its path, so replacing the package under a running machine cannot hurt it. A frozen app has no
Python to run it with: there the app itself, started with a reserved argument, is the guard.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn

WATCHING = b"watching\n"
ARGUMENT = "--ovm-guard"
"""A frozen app started with this and a process id is the guard of that process."""
CONFINE_ARGUMENT = "--ovm-confine"
"""A frozen app started with this is what confines a helper; see :mod:`ovm.process.landlock`."""

SWEEP_S = 1.0
"""For so long who joins the group late is killed, too; whoever reaps the dead is quicker, and then nobody can join."""
SWEEP_AGAIN_S = 0.005

_supported = False


def freeze_support() -> None:
    """Let a frozen app be its own guard, and confine helpers. Call it first thing in the app's main script.

    Does nothing but make a note, unless this process was started to be a guard or to become a helper: then it does
    not return. Apps frozen by PyInstaller need no call of their own, for ovm's hook makes it. Outside a frozen app it
    is harmless.
    """
    global _supported  # noqa: PLW0603 - whether it was called is a fact about this process
    _supported = True
    if not frozen_app():
        return
    if sys.argv[1:2] == [ARGUMENT] and len(sys.argv) == 3:
        watch(int(sys.argv[2]))
    if sys.argv[1:2] == [CONFINE_ARGUMENT]:
        from ovm.process import landlock

        landlock.main(sys.argv[2:])


def is_supported() -> bool:
    """Whether this process has called :func:`freeze_support`."""
    return _supported


def frozen_app() -> str:
    """The program that starts this frozen app again; empty where Python is an ordinary one."""
    frozen = getattr(sys, "frozen", False)
    if frozen == "macosx_app":  # py2app: sys.executable is a bare interpreter
        return os.environ.get("EXECUTABLEPATH", sys.executable)
    if frozen:
        return sys.executable
    return sys.argv[0] if "__compiled__" in globals() else ""  # Nuitka: there is no sys.executable to run


def watch(manager: int) -> NoReturn:
    """Wait for ``manager`` to die, then kill our process group, ourselves included."""
    if os.getpgrp() != os.getpid():
        sys.exit("the guard must lead a process group of its own")
    for harmless in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(harmless, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _end_group())
    try:
        wait = _exit_waiter(manager)
    except ProcessLookupError:
        _end_group()
    if os.getppid() != manager:  # it died before we looked, and its pid may be somebody else's by now
        _end_group()
    os.write(1, WATCHING)
    os.close(1)
    wait()
    _end_group()


if sys.platform == "darwin":
    import select
    from collections.abc import Callable

    def _exit_waiter(pid: int) -> Callable[[], object]:
        queue = select.kqueue()
        gone = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD | select.KQ_EV_ONESHOT, select.KQ_NOTE_EXIT)
        queue.control([gone], 0)
        return lambda: queue.control(None, 1)
else:
    import select
    from collections.abc import Callable

    _SYS_PIDFD_OPEN = 434  # on every architecture

    def _exit_waiter(pid: int) -> Callable[[], object]:
        fd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else _pidfd_open(pid)
        return lambda: select.select([fd], [], [])

    def _pidfd_open(pid: int) -> int:
        """For Pythons that were built on a system older than the one they run on; cx_Freeze brings one."""
        import ctypes

        fd: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_OPEN, pid, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_open")
        os.set_inheritable(fd, False)
        return fd


def _end_group() -> NoReturn:
    """Kill everybody in the group: a helper that was just being started joins it when the manager is dead already.

    So it is done by a child in a group of its own, again and again until there is no group left to join.
    """
    group = os.getpgrp()
    try:
        if os.fork():
            signal.pause()  # the signal is ours too
        os.setpgid(0, 0)
    except OSError:  # no more processes are to be had
        os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + SWEEP_S
    try:
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(SWEEP_AGAIN_S)
    except ProcessLookupError:
        pass
    os._exit(0)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
