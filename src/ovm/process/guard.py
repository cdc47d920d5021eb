"""The guard: a small process that kills every helper when the manager dies.

It leads a process group into which every helper is spawned. It watches the manager through a pidfd (Linux) or
kqueue (macOS): forked children of the manager would keep a pipe open, and a pid may be reused. When the manager
dies, in whatever way, the guard kills the group at once.

Run as a program (``python guard.py PID``), this module is the guard. It only imports the standard library and is
started by its path, so replacing the package does not affect a running machine. A frozen app has no Python to run it:
there the app itself, started with a reserved argument, is the guard.
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
"""A frozen app started with this confines a helper; see :mod:`ovm.process.landlock`."""

SWEEP_S = 1.0
"""Processes that join the group this late are still killed. Usually the dead are reaped sooner; then none can join."""
SWEEP_AGAIN_S = 0.005

_supported = False


def freeze_support() -> None:
    """Let a frozen app be its own guard, and confine helpers. Call it at the start of the app's main script.

    It only records the call, unless this process was started as a guard or to become a helper: then it does not
    return. Apps frozen by PyInstaller need no call: ovm's hook makes it. Outside a frozen app it is harmless.
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
    """Return whether this process has called :func:`freeze_support`."""
    return _supported


def frozen_app() -> str:
    """Return the program that starts this frozen app; empty if Python is not frozen."""
    frozen = getattr(sys, "frozen", False)
    if frozen == "macosx_app":  # py2app: sys.executable is a bare interpreter
        return os.environ.get("EXECUTABLEPATH", sys.executable)
    if frozen:
        return sys.executable
    return sys.argv[0] if "__compiled__" in globals() else ""  # Nuitka: there is no sys.executable to run


def watch(manager: int) -> NoReturn:
    """Wait until ``manager`` dies, then kill this process's group, including itself."""
    if os.getpgrp() != os.getpid():
        sys.exit("the guard must lead its own process group")
    for harmless in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(harmless, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _end_group())
    try:
        wait = _exit_waiter(manager)
    except ProcessLookupError:
        _end_group()
    if os.getppid() != manager:  # it died before the pidfd was opened, which may refer to another process
        _end_group()
    os.write(1, WATCHING)  # last: the manager waits for this before it spawns the first helper
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
        """Open a pidfd in a Python built on an older system than it runs on, such as cx_Freeze's."""
        import ctypes

        fd: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_OPEN, pid, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_open")
        os.set_inheritable(fd, False)
        return fd


def _end_group() -> NoReturn:
    """Kill the whole group, repeatedly: a helper whose start was in progress joins it after the manager's death.

    A child in its own group does it, until the group no longer exists.
    """
    group = os.getpgrp()
    try:
        if os.fork():
            signal.pause()  # the child's SIGKILL ends this process too
        os.setpgid(0, 0)
    except OSError:  # fork failed: the process limit is reached
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
