"""Waits that cannot hang."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import pytest

from ovm.errors import HelperExited, NotReadyError
from ovm.process.supervise import first_exit, race


@pytest.fixture
async def helper(group, tmp_path):
    """A helper that runs until it is told otherwise."""
    log = tmp_path / "helper.log"
    log.write_text("its last words\n")
    child = await group.spawn("helper", ["sleep", "60"], log_path=log)
    yield child
    await child.end(grace_s=0)


async def value(what):
    return what


async def never(ended: asyncio.Event) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()


async def test_the_result_wins(helper):
    """What was awaited comes back if it is there first, and the helper lives on."""
    assert await race(value(42), [helper], stage="s", timeout_s=5) == 42
    assert helper.running


async def test_a_failure_comes_through(helper):
    """What the awaited thing raises is raised as it is."""

    async def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await race(fail(), [helper], stage="s", timeout_s=5)


async def test_a_death_ends_the_wait(helper):
    """A helper that dies meanwhile ends the wait at once, with how it died and its last words."""
    ended = asyncio.Event()
    waiting = asyncio.create_task(race(never(ended), [helper], stage="boot", timeout_s=60))
    await asyncio.sleep(0)
    os.kill(helper.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        with pytest.raises(HelperExited) as caught:
            await waiting
    assert caught.value.stage == "boot"
    assert caught.value.exit_reason == "killed by SIGKILL"
    assert caught.value.log_tail == ("its last words",)
    assert ended.is_set()


async def test_a_failure_after_the_death_is_not_complained_of(helper, monkeypatch):
    """What fails because the helper has died, and after it, is no error on top of the error that tells so."""
    loop = asyncio.get_running_loop()
    complaints = []
    monkeypatch.setattr(loop, "_exception_handler", lambda _loop, context: complaints.append(context))
    telling, exited = asyncio.Event(), helper.exited

    async def hang_up():
        await telling.wait()
        raise ConnectionResetError

    async def tell(stage):
        telling.set()
        return await exited(stage)

    monkeypatch.setattr(helper, "exited", tell)
    waiting = asyncio.create_task(race(hang_up(), [helper], stage="boot", timeout_s=60))
    os.kill(helper.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        with pytest.raises(HelperExited):
            await waiting
    del waiting
    await asyncio.sleep(0)  # the loop lets go of it only now
    gc.collect()
    assert complaints == []


async def test_the_deadline_shows_the_evidence(helper, tmp_path):
    """At the deadline the error says how long was waited, and shows the end of the given log."""
    console = tmp_path / "console"
    console.write_text("a\nb\n")
    ended = asyncio.Event()
    with pytest.raises(NotReadyError) as caught:
        await race(never(ended), [helper], stage="boot", timeout_s=0.01, evidence=console, hint="look")
    assert caught.value.message == "not ready within 0.01 s"
    assert caught.value.log_tail == ("a", "b")
    assert caught.value.hint == "look"
    assert ended.is_set()


async def test_cancelling_leaves_no_task_behind(helper):
    """A cancelled race has ended what it had started."""
    before = asyncio.all_tasks()
    ended = asyncio.Event()
    waiting = asyncio.create_task(race(never(ended), [helper], stage="s", timeout_s=60))
    for _ in range(3):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()
    assert asyncio.all_tasks() <= before


async def test_being_cancelled_while_tidying_up_is_not_forgotten(helper):
    """A cancellation that arrives while the losers of the race are being ended is still a cancellation."""
    tidying, go_on = asyncio.Event(), asyncio.Event()

    async def slow_to_end():
        try:
            await asyncio.Event().wait()
        finally:
            tidying.set()
            await go_on.wait()

    waiting = asyncio.create_task(race(slow_to_end(), [helper], stage="s", timeout_s=0.01))
    async with asyncio.timeout(5):
        await tidying.wait()
    waiting.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_the_first_to_end_is_found(group, tmp_path, helper):
    """Of several helpers the one that ends first is returned, and the others are let be."""
    short = await group.spawn("short", ["true"], log_path=tmp_path / "log")
    async with asyncio.timeout(5):
        assert await first_exit([helper, short]) is short
    assert helper.running
