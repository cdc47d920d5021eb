"""A file with the identities of a machine's helpers, in case manager *and* guard are killed and helpers keep running.

The next owner reads it if the machine's lock is held although the manager is dead. It kills a process only if it is
the recorded one: same boot, pid, start time and program, and of this user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ovm.process import identity
from ovm.process.child import Child
from ovm.process.identity import Identity
from ovm.trust.atomic import write_whole

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 10
END_S = 10.0
"""Timeout of killed processes' end; the kernel needs a while to free gigabytes."""
LOOK_S = 0.01


class _Told(msgspec.Struct, frozen=True):
    """The file's content."""

    boot_id: str
    manager: Identity
    helpers: dict[str, Identity]


class Roster:
    """The helpers of this process's machine; :func:`keep` creates it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._boot = identity.boot()
        self._manager = identity.of(os.getpid())
        self._helpers: dict[str, Identity] = {}

    def add(self, child: Child) -> None:
        """Record a helper that was just started; replace an earlier one of that name."""
        if (process := identity.of(child.pid)) is not None:
            self._helpers[child.name] = process
            self._write()

    def update(self) -> None:
        """Record the helpers' current programs: a wrapper becomes the program it wraps."""
        for name, was in self._helpers.items():
            if (now := identity.of(was.pid)) is not None and now.started == was.started:
                self._helpers[name] = now
        self._write()

    def remove(self) -> None:
        """Remove the file, unless a helper still runs."""
        if not any(identity.is_there(helper) for helper in self._helpers.values()):
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._manager is None:
            return
        told = _Told(boot_id=self._boot, manager=self._manager, helpers=self._helpers)
        try:
            _write(self.path, msgspec.json.encode(told))
        except OSError as error:  # on a full disk the machine runs without this precaution
            log.warning("%s cannot be written: %s", self.path, error.strerror)


@contextlib.contextmanager
def keep(path: Path) -> Iterator[Roster]:
    """Keep a roster in the file ``path``, removed on exit. The caller holds its directory's lock meanwhile."""
    roster = Roster(path)
    try:
        yield roster
    finally:
        roster.remove()


def reclaim(path: Path) -> list[str]:
    """Kill the helpers of a dead manager, by the roster in ``path``; return their names.

    Wait until they have ended, END_S seconds at most. Do nothing if the manager runs, the host has rebooted, or the
    file is damaged, missing or another user's.
    """
    told = _read(path)
    if told is None or not told.boot_id or told.boot_id != identity.boot() or identity.is_there(told.manager):
        return []
    killed = {name: helper for name, helper in told.helpers.items() if _kill(helper)}
    deadline = time.monotonic() + END_S
    while any(identity.is_there(helper) for helper in killed.values()) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    if killed:
        log.warning("killed %s, left by process %d, which is dead", ", ".join(killed), told.manager.pid)
    return list(killed)


def _write(path: Path, content: bytes) -> None:
    write_whole(path, content, 0o600, durable=False)  # a power cut invalidates it anyway


def _read(path: Path) -> _Told | None:
    try:
        # O_NONBLOCK: do not wait for the other end of a fifo
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return None
        return msgspec.json.decode(os.read(fd, MAX_BYTES), type=_Told)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    finally:
        os.close(fd)


def _kill(helper: Identity) -> bool:
    """Send SIGKILL to the helper, checked by identity; return whether it was sent."""
    try:
        fd = os.pidfd_open(helper.pid) if hasattr(os, "pidfd_open") else None
    except ProcessLookupError:
        return False
    except OSError:  # a kernel before 5.3
        fd = None
    try:
        # checked after the pidfd is open: a process that has this identity now is the pidfd's
        if not _is_it(helper):
            return False
        if fd is not None and hasattr(signal, "pidfd_send_signal"):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        else:
            os.kill(helper.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    else:
        return True
    finally:
        if fd is not None:
            os.close(fd)


def _is_it(helper: Identity) -> bool:
    return (
        bool(helper.program)
        and helper.pid != os.getpid()
        and identity.of(helper.pid) == helper
        and identity.owner(helper.pid) == os.geteuid()
    )
