"""One owner of a directory, by kernel lock.

The lock belongs to an open file, and every helper inherits that file. So a lock that is free means
that the manager *and* its last helper are gone, whatever became of them; no pid is ever believed.

If manager and guard were killed together, the helpers live on and hold it. Then it is told by identity that the
manager is dead, and its helpers are ended by theirs (see :mod:`ovm.process.orphans`).
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
"""The last helpers of a manager that was killed are gone by then; a running machine is not."""
NOTE_MAX_BYTES = 16 << 10


class Lock:
    """Kernel locks on some directories; :func:`hold` makes one."""

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds
        _open_locks().add(self)

    def release(self) -> None:
        """Take our name out of the files, and let go."""
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
        self.close()

    def close(self) -> None:
        """Let go. The lock stays held for as long as a helper has inherited it."""
        while self.fds:
            os.close(self.fds.pop())


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner writes into the lock file: for people, for patience, and to find what a dead one has left."""

    boot_id: str
    manager: Identity
    command: str
    since: float
    brief: bool
    roster: str | None
    """The file that says who its helpers are."""

    @property
    def means_us(self) -> bool:
        """Whether its pids are of this boot, and counted as ours are."""
        return bool(self.boot_id) and self.boot_id == identity.boot()

    @property
    def lives(self) -> bool:
        """Whether its owner is there, by identity."""
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
    """Own ``directories`` while inside; waits for an owner that is about to go, and ends what a dead one has left.

    Args:
        directories: Each must exist.
        wait_s: How long to wait, in seconds; for an owner that is not brief GOING_S at most.
        brief: Whether this is for a piece of work that comes to its end by itself.
        helpers: The roster of those that will inherit the lock, for whoever finds it held after our death.

    Raises:
        InUseError: somebody else owns one of them; says who.
        FileError: the lock file cannot be made, or a directory or another user's file lies in its place.
    """
    lock = Lock([])
    note = await asyncio.to_thread(_our_note, brief=brief, helpers=helpers)
    began = time.monotonic()
    reclaimed = set()
    try:
        for directory in await asyncio.to_thread(_distinct, directories):
            # in no thread: if we were cancelled meanwhile, it would leave us with a lock that nobody knows of
            while (fd := _try(directory, note)) is None:
                waited = time.monotonic() - began
                # between two looks of other processes nobody owns it: whoever looks is waited for, even with no wait_s
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
    """Each directory once, in the same order for everybody, so that two starts cannot wait for each other."""
    return sorted({directory.resolve() for directory in directories})


def owner(directory: Path) -> Identity | None:
    """The manager that says it has locked ``directory``, as long as somebody has."""
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
    with contextlib.suppress(OSError):  # a full disk takes the name from the message, not the lock from us
        os.ftruncate(fd, 0)
        os.pwrite(fd, note, 0)
    return fd


def _told(directory: Path) -> _Note | None:
    """What the last owner wrote into the lock file. Who owns the lock, the kernel alone knows."""
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
    """The error that says who holds the lock, which need not be the one who wrote the note."""
    if note is not None and note.lives:
        return InUseError(
            f"{directory} is in use by {note.owner}{_since(note)}",
            hint="stop that machine first, or give this one directories of its own",
        )
    found = holders(directory / LOCK)
    who = ", ".join(f"{Path(holder.program).name or 'a program'} (process {holder.pid})" for holder in found)
    if note is None or not note.is_dead:
        return InUseError(f"{directory} is in use by {who or 'another process'}", hint="give directories of its own")
    return InUseError(
        f"{directory} is in use by {who or 'helpers'}, left by {note.owner}, which is dead",
        hint="end what is left: kill " + " ".join(str(holder.pid) for holder in found) if found else "",
    )


def _since(note: _Note) -> str:
    try:
        return time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime(note.since))
    except (ValueError, OverflowError, OSError):
        return ""


def holders(path: Path) -> list[Identity]:
    """The processes of this user that hold the lock, as Linux tells; macOS does not."""
    with contextlib.suppress(OSError):
        file = path.stat()
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [holder for pid in pids if _has_locked(pid, file) and (holder := identity.of(pid)) is not None]
    return []


def _has_locked(pid: int, file: os.stat_result) -> bool:
    with contextlib.suppress(OSError):  # it is another user's, or has just ended
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(fd.stat(), file) and b"FLOCK" in Path(f"/proc/{pid}/fdinfo/{fd.name}").read_bytes():
                    return True
    return False


@functools.cache
def _open_locks() -> weakref.WeakSet[Lock]:
    """The locks of this process, which a forked child must not keep: it would hold them past our death."""
    locks: weakref.WeakSet[Lock] = weakref.WeakSet()

    def forget() -> None:
        for lock in tuple(locks):
            lock.close()

    os.register_at_fork(after_in_child=forget)
    return locks
