"""Starts and stops that are called off, joined or hurried."""

from __future__ import annotations

import asyncio
import random

import pytest

import ovm
import tiny

pytestmark = pytest.mark.tiny

STEPS = ["guard", "network", "hypervisor", "guest", "ready"]


@pytest.mark.parametrize("step", STEPS[:-1])
async def test_a_start_cancelled_after_a_step(machines: tiny.Machines, step: str) -> None:
    """A start that is cancelled after any step leaves no process and no file."""
    m = await machines()
    starting = m.start_soon()
    await m.until_step(step)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert (m.events, m.state) == (["close"], "Stopped")
    assert await machines.leftovers() == []


async def test_starts_cancelled_at_any_moment(machines: tiny.Machines) -> None:
    """A start that is cancelled at any moment leaves nothing, and a later start succeeds."""
    m = await machines()
    moments = random.Random(7)
    for count in range(1, 41):
        starting = m.start_soon()
        await asyncio.sleep(moments.choice([0, moments.uniform(0, 0.05), moments.uniform(0, 0.6)]))
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert m.state == "Stopped"
        assert set(m.events) <= {"close"}, count
        assert await machines.leftovers() == []
    async with m.ovm:
        assert m.state == "Running"


async def test_a_start_cancelled_twice(machines: tiny.Machines) -> None:
    """A second cancellation does not interrupt the cleanup of the first."""
    m = await machines()
    starting = m.start_soon()
    await m.until_step("hypervisor")
    starting.cancel()
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await m.until(event="close")
    assert await machines.leftovers() == []


@pytest.mark.parametrize("step", ["guard", "hypervisor"])
async def test_a_stop_during_a_start_cancels_it(machines: tiny.Machines, step: str) -> None:
    """A stop during a start ends the start with an error and leaves nothing."""
    m = await machines()
    starting = m.start_soon()
    await m.until_step(step)
    await m.ovm.stop()
    assert m.state == "Stopped"
    with pytest.raises(ovm.StartError, match="stopped before it was ready"):
        await starting
    assert m.events == ["close"]
    assert await machines.leftovers() == []


async def test_a_stop_once_begun_is_finished_and_can_be_joined_and_hurried(machines: tiny.Machines) -> None:
    """A stop goes on when its caller is cancelled; other stops join it, and a forced one ends it."""
    m = await machines("m", "deaf")
    await m.ovm.start()
    first = asyncio.create_task(m.ovm.stop())
    await m.until(state="Stopping")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert m.state == "Stopping"
    with pytest.raises(ovm.StateError, match="stopping"):
        await m.ovm.vm_pause()
    with pytest.raises(ovm.StateError, match="already stopping"):
        await m.ovm.start()
    second, third = asyncio.create_task(m.ovm.stop()), asyncio.create_task(m.ovm.stop())
    async with asyncio.timeout(60):
        while "the power button was pressed" not in m.console():
            await asyncio.sleep(0.02)
    assert not second.done()  # the guest ignores the button
    await m.ovm.stop(force=True)
    await asyncio.gather(second, third)
    assert m.events == ["ready", "close"]
    assert await machines.leftovers() == []


async def test_a_guest_that_ignores_the_button_loses_its_power(machines: tiny.Machines) -> None:
    """A guest that ignores the power button is killed when the stop's timeout is over."""
    m = await machines("m", "deaf")
    await m.ovm.start()
    await m.ovm.stop(timeout_s=1.0)
    assert m.events == ["ready", "close"]


async def test_a_pause_is_overtaken_by_a_stop(machines: tiny.Machines) -> None:
    """A stop ends a pause that has begun, and the guest is shut down."""
    m = await machines()
    await m.ovm.start()
    pausing = asyncio.create_task(m.ovm.vm_pause())
    await asyncio.sleep(0)
    await m.ovm.stop()
    with pytest.raises(ovm.OVMError):
        await pausing
    assert m.transitions[-1] == "Stopped"
    assert m.events == ["ready", "close"]
    assert "the power button was pressed" in m.console()


async def test_a_cancelled_pause_leaves_a_machine_that_can_be_used(machines: tiny.Machines) -> None:
    """A machine can be paused, resumed and used after a pause or a resume was cancelled."""
    m = await machines()
    async with m.ovm:
        for call in (m.ovm.vm_pause, m.ovm.vm_resume):
            calling = asyncio.create_task(call())
            await asyncio.sleep(0)
            calling.cancel()
            await asyncio.wait({calling})
        await m.ovm.vm_pause()
        await m.ovm.vm_resume()
        assert (await m.ovm.vm_state()).state == "VirtualMachineStateRunning"
        assert await m.tell("echo awake") == "awake\n"
