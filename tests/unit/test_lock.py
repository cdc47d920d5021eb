"""The lock: one owner, for as long as any of its helpers lives."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import watched
from ovm.errors import FileError, InUseError
from ovm.paths import LOCK
from ovm.process import lock

ON_LINUX = sys.platform == "linux"

OWNER = """
import asyncio, sys
from pathlib import Path
from ovm.process import lock, orphans
from ovm.process.child import Child

async def main():
    at = Path(sys.argv[2]) if sys.argv[2:] else None
    async with lock.hold([Path(sys.argv[1])], wait_s=0, helpers=at) as held:
        helper = await asyncio.create_subprocess_exec(
            "sleep", "60", pass_fds=held.fds, stdout=asyncio.subprocess.DEVNULL
        )
        if at:
            orphans.Roster(at).add(Child("sleep", helper))
        print(helper.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def is_free(directory) -> bool:
    try:
        async with lock.hold([directory], wait_s=0):
            return True
    except InUseError:
        return False


async def refusal(directory) -> InUseError:
    with pytest.raises(InUseError) as caught:
        async with lock.hold([directory], wait_s=0):
            pass
    return caught.value


async def test_a_second_owner_is_refused_and_told_who_has_it(tmp_path):
    """Whoever comes second gets InUseError with the owner's process id and advice."""
    async with lock.hold([tmp_path], wait_s=0):
        with pytest.raises(InUseError) as caught:
            async with lock.hold([tmp_path], wait_s=0):
                pass
    assert f"process {os.getpid()} (" in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert "stop that machine first" in caught.value.hint


async def test_it_is_free_again_afterwards(tmp_path):
    """Leaving the block lets go, after an error too."""
    with contextlib.suppress(ZeroDivisionError):
        async with lock.hold([tmp_path], wait_s=0):
            _ = 1 / 0
    assert await is_free(tmp_path)


async def test_an_owner_about_to_go_is_waited_for(tmp_path):
    """With time to wait, the second owner gets the lock when the first lets go."""
    got = asyncio.Event()

    async def second():
        async with lock.hold([tmp_path], wait_s=5):
            got.set()

    async with lock.hold([tmp_path], wait_s=0):
        waiting = asyncio.create_task(second())
        await asyncio.sleep(0)
        assert not got.is_set()
    async with asyncio.timeout(5):
        await waiting
    assert got.is_set()


async def test_a_look_at_the_lock_is_waited_for(tmp_path):
    """A directory is owned even by a caller that does not wait, although ``ovm ls`` looks at its lock just then."""
    with (tmp_path / LOCK).open("ab") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        asyncio.get_running_loop().call_later(lock.HELD_RETRY_S, looking.close)
        async with lock.hold([tmp_path], wait_s=0):
            assert looking.closed


async def test_a_cancelled_wait_leaves_no_lock(tmp_path):
    """Cancelling whoever waits for a lock leaves it to others."""
    async with lock.hold([tmp_path], wait_s=0):
        stack = contextlib.AsyncExitStack()
        waiting = asyncio.create_task(stack.enter_async_context(lock.hold([tmp_path], wait_s=5)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
    assert await is_free(tmp_path)


async def test_one_directory_under_two_names_is_one(tmp_path):
    """Naming a directory twice, once through a link, is no deadlock with oneself; another's link is no way round."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    async with lock.hold([real, link, real], wait_s=0) as held:
        assert len(held.fds) == 1
        assert not await is_free(link)


async def test_all_or_nothing(tmp_path):
    """If one of several directories is taken, none is kept."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    async with lock.hold([second], wait_s=0):
        assert not await is_free(second)
        with pytest.raises(InUseError, match="/b is in use"):
            async with lock.hold([first, second], wait_s=0):
                pass
        assert await is_free(first)


async def test_a_helper_keeps_the_lock_that_it_inherited(tmp_path):
    """The lock is not free before the last helper that inherited it has gone."""
    async with lock.hold([tmp_path], wait_s=0) as held:
        helper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=held.fds)
    try:
        assert not await is_free(tmp_path)
    finally:
        helper.communicate()
    assert await is_free(tmp_path)


async def test_a_program_that_inherits_nothing_keeps_nothing(tmp_path):
    """The lock's file is not leaked into programs that were not given it."""
    async with lock.hold([tmp_path], wait_s=0):
        stranger = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert await is_free(tmp_path)
    finally:
        stranger.communicate()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_forked_child_keeps_nothing(tmp_path):
    """A child that the manager's own program forked does not hold the machine's lock."""
    ready, go_on = os.pipe(), os.pipe()
    async with lock.hold([tmp_path], wait_s=0):
        pid = os.fork()
        if pid == 0:
            os.write(ready[1], b"x")
            os.close(go_on[1])
            os.read(go_on[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        assert await is_free(tmp_path)
    finally:
        os.close(go_on[1])
        os.waitpid(pid, 0)
        for fd in (*ready, go_on[0]):
            os.close(fd)


async def test_the_lock_of_a_killed_owner_is_free_when_its_helpers_are(tmp_path):
    """After SIGKILL of the owner its helper still holds the lock; once that is gone too, it is free."""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, tmp_path, stdout=subprocess.PIPE)
    helper = int(await owner.stdout.readline())
    watch = os.pidfd_open(helper)
    try:
        owner.kill()
        await owner.wait()
        assert not await is_free(tmp_path)
    finally:
        signal.pidfd_send_signal(watch, signal.SIGKILL)
        os.close(watch)
    async with lock.hold([tmp_path], wait_s=5) as held:
        assert held.fds


NOTES = [b"", b"[]", b"\xff not json", b"[" * 10_000, b"{}", b'{"pid": 1}', b"\x00" * 100_000]


@pytest.mark.parametrize("note", NOTES, ids=lambda note: repr(note[:10]))
async def test_who_has_it_is_for_people_only(tmp_path, note):
    """A lock file with rubbish in it is a free lock; one held without a name is held, and the kernel knows by whom."""
    (tmp_path / LOCK).write_bytes(note)
    assert await is_free(tmp_path)
    async with lock.hold([tmp_path], wait_s=0):
        (tmp_path / LOCK).write_bytes(note)
        error = await refusal(tmp_path)
    whom = f"{Path(sys.executable).resolve().name} (process {os.getpid()})" if ON_LINUX else "another process"
    assert error.message == f"{tmp_path} is in use by {whom}"


async def test_a_note_of_another_boot_names_nobody(tmp_path):
    """Not even if that pid is somebody's now: it is neither called the owner, nor called dead."""
    async with lock.hold([tmp_path], wait_s=0):
        note = json.loads((tmp_path / LOCK).read_bytes())
        (tmp_path / LOCK).write_text(json.dumps(note | {"boot_id": "another"}))
        error = await refusal(tmp_path)
    assert f"process {os.getpid()} ({sys.argv[0]})" not in error.message
    assert "dead" not in error.message


async def test_a_reused_pid_is_not_called_the_owner(tmp_path):
    """The note's pid is a process's, but one that started at another time: the owner is dead."""
    async with lock.hold([tmp_path], wait_s=0):
        note = json.loads((tmp_path / LOCK).read_bytes())
        note["manager"]["started"] -= 1
        (tmp_path / LOCK).write_text(json.dumps(note))
        error = await refusal(tmp_path)
    assert "since" not in error.message
    assert f"left by process {os.getpid()} ({sys.argv[0]}), which is dead" in error.message


async def test_a_free_lock_names_nobody(tmp_path):
    """Whoever has let go is not taken for the owner while the next one has not yet written its name."""
    async with lock.hold([tmp_path], wait_s=0):
        assert (tmp_path / LOCK).read_bytes()
    assert (tmp_path / LOCK).read_bytes() == b""


async def test_what_a_dead_owner_left_is_named(tmp_path):
    """A helper that no roster names is not touched, but told of: who it is, and how it is ended."""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, tmp_path, stdout=subprocess.PIPE)
    helper = int(await owner.stdout.readline())
    with watched.watching({"helper": helper}) as pidfds:
        owner.kill()
        await owner.wait()
        error = await refusal(tmp_path)
        assert watched.still_there(*pidfds.values())
    who = f"sleep (process {helper})" if ON_LINUX else "helpers"
    assert error.message == f"{tmp_path} is in use by {who}, left by process {owner.pid} (-c), which is dead"
    assert error.hint == (f"kill what is left: kill {helper}" if ON_LINUX else "")


async def test_what_a_dead_owner_left_is_ended_by_its_roster(tmp_path):
    """Whoever comes next does not wait for helpers that nobody will ever end, not even where it waits for nobody."""
    (tmp_path / "other").mkdir()
    roster = tmp_path / "other" / "helpers.json"  # of another directory than the one that is wanted
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, tmp_path, roster, stdout=subprocess.PIPE)
    helper = int(await owner.stdout.readline())
    with watched.watching({"helper": helper}) as pidfds:
        owner.kill()
        await owner.wait()
        assert watched.still_there(*pidfds.values())
        assert await is_free(tmp_path)
        assert watched.gone_within(0, *pidfds.values())


async def test_a_lock_is_private(tmp_path):
    """The lock file is its owner's alone."""
    async with lock.hold([tmp_path], wait_s=0):
        assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o600


async def test_a_missing_directory_is_a_file_error(tmp_path):
    """A directory that is not there is told as such."""
    with pytest.raises(FileError, match="No such file"):
        async with lock.hold([tmp_path / "missing"], wait_s=0):
            pass
