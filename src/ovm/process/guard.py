"""The guard: a small process that ends every helper when the manager is gone.

It leads a process group, every helper is spawned into that group, and it watches the manager through a
pidfd (Linux) or kqueue (macOS): a pipe's end-of-file would be kept open by the manager's own forked
children, and a bare pid may be reused. When the manager dies, however it dies, the group is killed at once.

Run as a program (``python guard.py PID``) it is the guard. It imports the standard library alone and is
started by its path, so replacing the package under a running machine cannot hurt it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

WATCHING = b"watching\n"


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

    def _exit_waiter(pid: int) -> Callable[[], object]:
        fd = os.pidfd_open(pid)
        return lambda: select.select([fd], [], [])


def _end_group() -> NoReturn:
    os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)  # never reached: the signal is ours too


if __name__ == "__main__":
    watch(int(sys.argv[1]))
