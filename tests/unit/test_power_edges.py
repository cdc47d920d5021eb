"""Which sleeps and wakes are passed on, and that a callback's failure stays its own."""

from __future__ import annotations

import asyncio

import pytest

from ovm.power import filter as edges_module
from ovm.power.filter import DARK_WAKE_S, SAME_WAKE_S
from power import Told, fail, hang, time_to_set, turns, until

LONG_S = 60.0


@pytest.fixture
async def told():
    """One who is told of everything."""
    told = Told()
    yield told
    await told.edges.close()


async def test_a_sleep_waits_for_what_is_to_be_done(told):
    """It returns after the callback, not before."""
    go_on = asyncio.Event()
    told.on_sleep = go_on.wait
    sleep = asyncio.create_task(told.edges.sleep(LONG_S))
    await turns()
    assert told.words == ["sleep"]
    assert not sleep.done()
    go_on.set()
    await sleep


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ("s w", "sleep wake"),
        ("s s", "sleep"),
        ("s s w", "sleep wake"),
        ("s w w", "sleep wake"),
        ("w", "wake"),
        ("w w", "wake"),
        ("w s w", "wake sleep wake"),
        ("s w s w", "sleep wake sleep wake"),
        ("n", ""),
        ("s n", "sleep wake"),
        ("s n w", "sleep wake"),
        ("s n n", "sleep wake"),
        ("s s n s w", "sleep wake sleep wake"),
    ],
)
async def test_each_edge_once(told, edges, words):
    """s: about to sleep, w: woke, n: will not sleep after all."""
    for edge in edges.split():
        match edge:
            case "s":
                await told.edges.sleep(LONG_S)
            case "w":
                told.edges.wake()
            case "n":
                told.edges.stayed_awake()
        await turns()
    assert told.words == words.split()


async def test_a_wake_seen_by_the_clock_and_then_told_is_one(told):
    """The tick is faster than HasPoweredOn, sometimes."""
    told.host.step(3600)
    assert told.host.clocks.jumped()
    told.edges.jumped()
    await turns()
    told.host.pass_by(4)
    told.edges.wake()
    await turns()
    assert told.words == ["wake"]


async def test_a_wake_told_and_then_seen_by_the_clock_is_one(told):
    """What the clock jumped by is that wake's."""
    await told.edges.sleep(LONG_S)
    told.host.step(3600)
    told.edges.wake()
    await turns()
    assert not told.host.clocks.jumped()
    assert told.words == ["sleep", "wake"]


async def test_two_wakes_with_a_sleep_between_that_nobody_told(told):
    """Soon after one another, and still two: the clock has jumped again."""
    told.edges.wake()
    await turns()
    told.host.step(120)
    told.edges.wake()
    await turns()
    assert told.words == ["wake", "wake"]


async def test_two_wakes_long_after_one_another(told, monkeypatch):
    """They are not taken for the same one; soon after one another they are."""
    with time_to_set(monkeypatch) as pass_by:
        told.edges.wake()
        await pass_by(SAME_WAKE_S - 0.1)
        told.edges.wake()
        await turns()
        assert told.words == ["wake"]
        await pass_by(0.2)
        told.edges.wake()
        await turns()
    assert told.words == ["wake", "wake"]


async def test_every_jump_outside_a_sleep_is_a_wake(told):
    """The clock is to be set each time."""
    for _ in range(3):
        told.edges.jumped()
        await turns()
    assert told.words == ["wake", "wake", "wake"]


async def test_a_dark_wake_leaves_the_guest_paused(told):
    """The host goes back to sleep without a word."""
    await told.edges.sleep(LONG_S)
    for _ in range(3):
        told.edges.jumped()
        await turns()
    assert told.words == ["sleep"]
    told.edges.wake()
    await turns()
    assert told.words == ["sleep", "wake"]


async def test_a_host_that_stays_awake_is_awake(told, monkeypatch):
    """Although nobody ever tells of it; one who does later tells nothing new."""
    with time_to_set(monkeypatch) as pass_by:
        await told.edges.sleep(LONG_S)
        told.edges.jumped()
        await pass_by(DARK_WAKE_S - 0.1)
        assert told.words == ["sleep"]
        await pass_by(0.2)
        assert told.words == ["sleep", "wake"]
        told.edges.wake()
        await turns()
        assert told.words == ["sleep", "wake"]


async def test_each_dark_wake_counts_for_itself(told, monkeypatch):
    """Many short ones are no long one."""
    with time_to_set(monkeypatch) as pass_by:
        await told.edges.sleep(LONG_S)
        for _ in range(3):
            told.edges.jumped()
            await pass_by(DARK_WAKE_S - 0.1)
            assert told.words == ["sleep"]
        await pass_by(0.2)
        assert told.words == ["sleep", "wake"]


async def test_a_dark_wake_is_forgotten_when_the_wake_is_told(told, monkeypatch):
    """Or the guest would be woken in the middle of the next sleep."""
    with time_to_set(monkeypatch) as pass_by:
        await told.edges.sleep(LONG_S)
        told.edges.jumped()
        told.edges.wake()
        await turns()
        await told.edges.sleep(LONG_S)
        await pass_by(2 * DARK_WAKE_S)
        assert told.words == ["sleep", "wake", "sleep"]


async def test_a_hanging_callback_does_not_keep_the_host_awake(told, caplog):
    """It is cancelled when its time is over, and that is said."""
    told.on_sleep = hang
    await told.edges.sleep(0.01)
    await turns()
    assert told.words == ["sleep", "sleep cancelled"]
    assert "the host sleeps anyway" in caplog.text


async def test_a_failing_callback_does_not_keep_the_host_awake(told, caplog):
    """Its failure is logged, with where it happened."""
    told.on_sleep = fail
    await told.edges.sleep(LONG_S)
    assert "it went wrong" in caplog.text
    told.on_wake = fail
    caplog.clear()
    told.edges.wake()
    await until(lambda: "it went wrong" in caplog.text)
    await told.edges.sleep(LONG_S)
    assert told.words == ["sleep", "wake", "sleep"]


async def test_a_sleep_ends_a_wake_that_still_runs(told):
    """And comes after it, not beside it."""
    told.on_wake = hang
    told.edges.wake()
    await turns()
    await told.edges.sleep(LONG_S)
    assert told.words == ["wake", "wake cancelled", "sleep"]


async def test_a_wake_that_does_not_end_does_not_keep_the_sleep_waiting(told, monkeypatch):
    """Even one that takes no notice of being cancelled."""
    monkeypatch.setattr(edges_module, "CANCEL_S", 0.01)
    over = asyncio.Event()

    async def stubborn() -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    told.on_wake = stubborn
    told.edges.wake()
    await turns()
    await told.edges.sleep(LONG_S)
    assert told.words == ["wake", "sleep"]
    over.set()
    await turns()


async def test_a_wake_ends_a_sleep_that_still_runs(told):
    """One that was called off: what waits for the sleep is let go."""
    told.on_sleep = hang
    sleep = asyncio.create_task(told.edges.sleep(LONG_S))
    await turns()
    told.edges.stayed_awake()
    await sleep
    await until(lambda: told.words == ["sleep", "sleep cancelled", "wake"])


async def test_a_second_sleep_waits_for_the_first(told):
    """One call, and both may sleep when it is done."""
    go_on = asyncio.Event()
    told.on_sleep = go_on.wait
    sleeps = [asyncio.create_task(told.edges.sleep(LONG_S)) for _ in range(2)]
    await turns()
    assert not any(sleep.done() for sleep in sleeps)
    go_on.set()
    await asyncio.gather(*sleeps)
    assert told.words == ["sleep"]


async def test_one_who_gives_up_waiting_ends_the_callback(told):
    """The thread that asked has let the host sleep by then."""
    told.on_sleep = hang
    sleep = asyncio.create_task(told.edges.sleep(LONG_S))
    await turns()
    sleep.cancel()
    await turns()
    assert told.words == ["sleep", "sleep cancelled"]


async def test_nothing_is_passed_on_after_the_end(told):
    """What comes from a thread late is dropped."""
    told.on_wake = hang
    told.edges.wake()
    await turns()
    await told.edges.close()
    told.edges.wake()
    told.edges.jumped()
    await told.edges.sleep(LONG_S)
    await turns()
    assert told.words == ["wake", "wake cancelled"]
