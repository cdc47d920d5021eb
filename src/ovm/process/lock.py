"""One owner of a directory, by kernel lock.

The lock belongs to an open file, which every helper inherits. So a released lock means that the manager *and* its last
helper have ended, however they ended; no pid is trusted.

If manager and guard are both killed, the helpers keep running and hold the lock. Then the manager's identity shows
that it is dead, and the helpers are killed by theirs (see :mod:`ovm.process.orphans`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys
import time
import weakref
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec

from ovm.errors import FileError, InUseError
from ovm.paths import LOCK
from ovm.process import identity, orphans
from ovm.process.identity import Identity
from ovm.trust.locks import HELD_RETRY_S, LOOK_WAIT_S, is_held, open_lock, try_lock

GOING_S = 5.0
"""Time after which the last helpers of a killed manager have ended, but a running machine's have not."""
NOTE_MAX_BYTES = 16 << 10


class Lock:
    """Kernel locks on some directories; :func:`hold` creates it."""

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds
        _open_locks().add(self)

    def release(self) -> None:
        """Erase the notes in the lock files and close them."""
        for fd in self.fds:  # while still locked, or it would erase the next owner's note
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
        self.close()

    def close(self) -> None:
        """Close the lock files. The lock stays held until the helpers that inherited it end."""
        while self.fds:
            os.close(self.fds.pop())


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """An owner's note in the lock file: for messages, for the timeout, and to find a dead owner's helpers."""

    boot_id: str
    manager: Identity
    command: str
    since: float
    brief: bool
    roster: str | None
    """The file with the identities of its helpers."""

    @property
    def means_us(self) -> bool:
        """Whether its pids are of this boot and this pid namespace."""
        return bool(self.boot_id) and self.boot_id == identity.boot()

    @property
    def lives(self) -> bool:
        """Whether its owner runs, by identity."""
        return self.means_us and identity.is_there(self.manager)

    @property
    def is_dead(self) -> bool:
        """Whether its owner is known to have ended."""
        return self.means_us and not identity.is_there(self.manager)

    @property
    def owner(self) -> str:
        return f"process {self.manager.pid} ({self.command or 'python'})"


@contextlib.asynccontextmanager
async def hold(
    directories: Iterable[Path], *, wait_s: float, brief: bool = False, helpers: Path | None = None
) -> AsyncIterator[Lock]:
    """Own ``directories`` while inside; wait for an owner that is about to end, and kill a dead owner's helpers.

    Args:
        directories: Each must exist.
        wait_s: Timeout in seconds; at most GOING_S unless the owner is brief.
        brief: Whether this owner's work ends by itself.
        helpers: The roster of the helpers that will inherit the lock, for the next owner after this one's death.

    Raises:
        InUseError: another process owns one of them; names it.
        FileError: the lock file cannot be created, or a directory or another user's file is in its place.
    """
    lock = Lock([])
    note = await asyncio.to_thread(_our_note, brief=brief, helpers=helpers)
    began = time.monotonic()
    reclaimed = set()
    try:
        for directory in await asyncio.to_thread(_distinct, directories):
            # not in a thread: cancelled meanwhile, this task would never release the lock
            while (fd := _try(directory, note)) is None:
                waited = time.monotonic() - began
                # not owned, only checked by other processes: wait for them even if wait_s is 0
                if waited < LOOK_WAIT_S and not await asyncio.to_thread(is_held, directory / LOCK):
                    await asyncio.sleep(HELD_RETRY_S)
                    continue
                told = await asyncio.to_thread(_told, directory)
                if told is not None and told.is_dead and told.manager not in reclaimed:
                    reclaimed.add(told.manager)
                    await asyncio.to_thread(_reclaim, told)
                    continue
                patient = told is not None and told.brief and told.lives
                if waited >= wait_s or (waited >= GOING_S and not patient):
                    raise await asyncio.to_thread(_in_use, directory, told)
                await asyncio.sleep(HELD_RETRY_S)
            lock.fds.append(fd)
        yield lock
    finally:
        lock.release()


def _distinct(directories: Iterable[Path]) -> list[Path]:
    """Return each directory once, always in the same order, so that two starts cannot deadlock."""
    return sorted({directory.resolve() for directory in directories})


def owner(directory: Path) -> Identity | None:
    """Return the manager that the note in ``directory`` names; the note alone does not prove that it holds the lock."""
    note = _told(directory)
    return None if note is None else note.manager


def _our_note(*, brief: bool, helpers: Path | None) -> bytes:
    if (manager := identity.of(os.getpid())) is None:  # there is no /proc
        return b""
    note = _Note(
        boot_id=identity.boot(),
        manager=manager,
        command=_text(sys.argv[0]),
        since=time.time(),
        brief=brief,
        roster=_text(helpers.absolute()) if helpers else None,
    )
    return msgspec.json.encode(note)


def _text(path: str | Path) -> str:
    return os.fsencode(path).decode(errors="replace")


def _try(directory: Path, note: bytes) -> int | None:
    fd = open_lock(directory / LOCK, replace=True)
    try:
        is_ours = try_lock(fd)
    except OSError as error:
        os.close(fd)
        raise FileError(
            f"cannot lock {directory}: {error.strerror}", hint="choose a directory on a local file system"
        ) from error
    if not is_ours:
        os.close(fd)
        return None
    with contextlib.suppress(OSError):  # on a full disk only the owner's name in other processes' messages is missing
        os.ftruncate(fd, 0)
        os.pwrite(fd, note, 0)
    return fd


def _told(directory: Path) -> _Note | None:
    """Read the last owner's note in the lock file. Only the kernel knows the current owner."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return msgspec.json.decode(os.read(fd, NOTE_MAX_BYTES), type=_Note)
        finally:
            os.close(fd)
    return None


def _reclaim(note: _Note) -> None:
    if note.roster is not None:
        orphans.reclaim(Path(note.roster))


def _in_use(directory: Path, note: _Note | None) -> InUseError:
    """Return the error that names the owner of the lock, which may differ from the writer of the note."""
    if note is not None and note.lives:
        return InUseError(
            f"{directory} is in use by {note.owner}{_since(note)}",
            hint="stop that machine first, or give this one its own directories",
        )
    found = holders(directory / LOCK)
    who = ", ".join(f"{Path(holder.program).name or 'a program'} (process {holder.pid})" for holder in found)
    if note is None or not note.is_dead:
        return InUseError(
            f"{directory} is in use by {who or 'another process'}", hint="give this machine its own directories"
        )
    return InUseError(
        f"{directory} is in use by {who or 'helpers'}, left by {note.owner}, which is dead",
        hint="kill what is left: kill " + " ".join(str(holder.pid) for holder in found) if found else "",
    )


def _since(note: _Note) -> str:
    try:
        return time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime(note.since))
    except (ValueError, OverflowError, OSError):
        return ""


def holders(path: Path) -> list[Identity]:
    """List the processes of this user that hold the lock; empty on macOS, which does not report them."""
    with contextlib.suppress(OSError):
        file = path.stat()
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [holder for pid in pids if _has_locked(pid, file) and (holder := identity.of(pid)) is not None]
    return []


def _has_locked(pid: int, file: os.stat_result) -> bool:
    with contextlib.suppress(OSError):  # it is another user's or has just ended
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(fd.stat(), file) and b"FLOCK" in Path(f"/proc/{pid}/fdinfo/{fd.name}").read_bytes():
                    return True
    return False


@functools.cache
def _open_locks() -> weakref.WeakSet[Lock]:
    """Return this process's locks. A forked child closes them: it would hold them beyond this process's death."""
    locks: weakref.WeakSet[Lock] = weakref.WeakSet()

    def forget() -> None:
        for lock in tuple(locks):
            lock.close()

    os.register_at_fork(after_in_child=forget)
    return locks
