"""The lock: one owner, for as long as any of its helpers lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

from ovm.errors import FileError, InUseError
from ovm.paths import LOCK
from ovm.process import lock

OWNER = """
import asyncio, subprocess, sys
from pathlib import Path
from ovm.process import lock

async def main():
    async with lock.hold([Path(sys.argv[1])], wait_s=0) as held:
        helper = subprocess.Popen(["sleep", "60"], pass_fds=held.fds, stdout=subprocess.DEVNULL)
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


async def test_who_has_it_is_for_people_only(tmp_path):
    """A lock file with rubbish in it is a free lock, and one held without a name is still held."""
    (tmp_path / LOCK).write_bytes(b"\xff not json")
    assert await is_free(tmp_path)
    async with lock.hold([tmp_path], wait_s=0):
        (tmp_path / LOCK).write_text("[]")
        with pytest.raises(InUseError, match="in use by another process"):
            async with lock.hold([tmp_path], wait_s=0):
                pass


async def test_a_lock_is_private_and_follows_no_link(tmp_path):
    """The lock file is 0600; a link in its place is refused, so nobody can have us truncate a file."""
    async with lock.hold([tmp_path], wait_s=0):
        assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o600
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).symlink_to(victim)
    with pytest.raises(FileError, match="cannot lock"):
        async with lock.hold([tmp_path], wait_s=0):
            pass
    assert victim.read_text() == "precious"


async def test_a_missing_directory_is_a_file_error(tmp_path):
    """A directory that is not there is told as such."""
    with pytest.raises(FileError, match="No such file"):
        async with lock.hold([tmp_path / "missing"], wait_s=0):
            pass
