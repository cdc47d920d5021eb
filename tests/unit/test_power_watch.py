"""The contract as a machine uses it: whatever the host has, and however the watch ends."""

from __future__ import annotations

import asyncio
import functools

import pytest

from ovm import power
from ovm.power import clock_jump, linux
from power import PATIENCE_S, HostClocks, Told, hang, until


@pytest.fixture
def host(monkeypatch) -> HostClocks:
    """A host whose clocks are the test's, looked at all the time; nobody there tells of anything."""
    host = HostClocks()
    monkeypatch.setattr(power, "Clocks", lambda: host.clocks)
    monkeypatch.setattr(clock_jump, "watch", functools.partial(clock_jump.watch, tick_s=0.001))
    monkeypatch.setattr(power, "_system", lambda _edges: hang())
    return host


async def test_the_clock_is_enough(host, monkeypatch):
    """Without D-Bus a sleep is still seen, afterwards."""
    monkeypatch.setattr(power, "_system", functools.partial(linux.watch, bus_address="unix:path=/nowhere/bus"))
    told = Told()
    async with power.watch(told.sleep, told.wake):
        host.step(3600)
        await until(lambda: told.words == ["wake"])
        host.step(3600)
        await until(lambda: told.words == ["wake", "wake"])


async def test_a_source_that_fails_takes_nothing_with_it(host, monkeypatch, caplog):
    """It is logged, and the clock is still looked at."""

    async def broken() -> None:
        raise RuntimeError("cannot listen")

    monkeypatch.setattr(power, "_system", lambda _edges: broken())
    told = Told()
    async with power.watch(told.sleep, told.wake):
        await until(lambda: "cannot listen" in caplog.text)
        host.step(3600)
        await until(lambda: told.words == ["wake"])


async def test_the_end_ends_what_still_runs(host):
    """A wake in progress is cancelled, not waited for; nothing of the watch is left."""
    tasks, told = asyncio.all_tasks(), Told()
    told.on_wake = hang
    async with power.watch(told.sleep, told.wake):
        host.step(3600)
        await until(lambda: told.words == ["wake"])
    assert told.words == ["wake", "wake cancelled"]
    assert asyncio.all_tasks() == tasks


async def test_cancelled_inside(host):
    """The same, and the cancellation goes on."""
    tasks, told = asyncio.all_tasks(), Told()
    inside = asyncio.Event()

    async def watched() -> None:
        async with power.watch(told.sleep, told.wake):
            inside.set()
            await hang()

    task = asyncio.create_task(watched())
    await asyncio.wait_for(inside.wait(), PATIENCE_S)
    task.cancel()
    await asyncio.wait({task}, timeout=PATIENCE_S)
    assert task.cancelled()
    assert asyncio.all_tasks() == tasks


async def test_an_error_inside_goes_on(host):
    """As it is."""
    with pytest.raises(ValueError, match="mine"):
        async with power.watch(Told().sleep, Told().wake):
            raise ValueError("mine")


async def test_a_source_that_does_not_end_is_left(host, monkeypatch):
    """The machine's end does not wait for it."""
    monkeypatch.setattr(power, "END_S", 0.01)
    over = asyncio.Event()

    async def stubborn() -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    monkeypatch.setattr(power, "_system", lambda _edges: stubborn())
    async with asyncio.timeout(PATIENCE_S), power.watch(Told().sleep, Told().wake):
        await asyncio.sleep(0)
    over.set()
