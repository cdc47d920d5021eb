"""The guard is killed: nobody would end the helpers if the manager died too, so the manager ends them at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import pytest

import ovm
import processes
import tiny
import under
from adopted import below

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="it looks for the guard in /proc"),
]

GONE_S = 2.0
"""Promised, from the kill on."""
GIVEN_UP_S = 30.0
LOOK_S = 0.01


@pytest.fixture
def others() -> frozenset[int]:
    """What runs already, and is no business of the test: the machine that other tests share."""
    return frozenset(below(os.getpid()))


def kill_guard(others: frozenset[int]) -> float:
    """Returns when it was done."""
    ours = below(os.getpid()).keys() - others
    (guard,) = [pid for pid in ours if f"guard.py {os.getpid()}" in processes.command(pid)]
    os.kill(guard, signal.SIGKILL)
    return time.monotonic()


async def gone_within_what_is_promised(killed: float, others: frozenset[int]) -> None:
    """The helpers; the time for which this process was made to wait for a processor does not count."""
    late = 0.0
    while (left := below(os.getpid()).keys() - others) and time.monotonic() < killed + GIVEN_UP_S:
        slept = time.monotonic()
        await asyncio.sleep(LOOK_S)
        late += time.monotonic() - slept - LOOK_S
    seconds = time.monotonic() - killed - late
    assert seconds <= GONE_S, f"{seconds:.2f} s, and {[processes.command(pid) for pid in left]}"


def is_told(error: ovm.OVMError) -> bool:
    """Whether it says what happened."""
    return isinstance(error, ovm.HelperExited) and error.message == "guard ended unexpectedly"


@under.QEMU_ALONE
@pytest.mark.parametrize("step", ["guard", "network", "hypervisor"])
async def test_between_two_steps_of_a_start(machines: tiny.Machines, others: frozenset[int], step: str) -> None:
    """A guard that is killed between two steps of a start ends the start, and is reported."""
    m = await machines()
    done, killed = m.ovm._context.step_done, 0.0

    def kill(name: str) -> None:
        nonlocal killed
        done(name)
        if name == step:
            killed = kill_guard(others)

    m.ovm._context.step_done = kill  # type: ignore[method-assign]
    starting = m.start_soon()
    await m.until_step(step)
    await gone_within_what_is_promised(killed, others)
    with pytest.raises(ovm.OVMError) as caught:
        await starting
    assert is_told(caught.value), caught.value
    assert m.events == ["error", "close"]
    assert await machines.leftovers() == []


@pytest.mark.parametrize("phase", ["booting", "running", "paused", "rebooting", "stopping"])
async def test_in_a_machines_life(machines: tiny.Machines, others: frozenset[int], phase: str) -> None:
    """A guard that is killed in any phase of a machine's life ends the machine in time."""
    m = await machines("m", *(["deaf"] if phase == "stopping" else []))
    starting = m.start_soon()
    if phase == "booting":
        await m.until_step("hypervisor")
        while not m.console():
            await asyncio.sleep(LOOK_S)
    else:
        await starting
    stopping = None
    match phase:
        case "paused":
            await m.ovm.vm_pause()
        case "rebooting":
            await m.order("busybox reboot -f")
            await m.until(state="Starting", count=2)
        case "stopping":
            stopping = asyncio.create_task(m.ovm.stop())
            while "the power button was pressed" not in m.console():
                await asyncio.sleep(LOOK_S)
    await gone_within_what_is_promised(kill_guard(others), others)
    if stopping is not None:
        await stopping
    elif phase == "booting":
        with pytest.raises(ovm.HelperExited) as caught:
            await starting
        assert is_told(caught.value), caught.value
    await m.until(event="close")
    assert m.state == "Stopped"
    if phase != "stopping":
        assert is_told(m.errors[0]), m.errors
    assert await machines.leftovers() == []
