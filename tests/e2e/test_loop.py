"""Event loops that end, or live elsewhere, while a machine runs."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import tiny
import under

pytestmark = pytest.mark.tiny


def in_a_thread(options: dict[str, Any], main: Any) -> tiny.Machine:
    """The machine that ``main`` was given, run by ``asyncio.run`` in a thread, which is over."""
    made = []

    async def run() -> None:
        machine = tiny.Machine(await under.create(options))
        made.append(machine)
        await main(machine)

    failures = []

    def thread() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    running = threading.Thread(target=thread)
    running.start()
    running.join(timeout=180)
    assert not running.is_alive()
    assert failures == []
    return made[0]


async def start(m: tiny.Machine) -> None:
    await m.ovm.start()


async def start_and_pause(m: tiny.Machine) -> None:
    await m.ovm.start()
    await m.ovm.vm_pause()


async def start_and_begin_to_stop(m: tiny.Machine) -> None:
    await m.ovm.start()
    stopping = asyncio.create_task(m.ovm.stop())
    await m.until(state="Stopping")
    stopping.cancel()


async def begin_to_start(m: tiny.Machine) -> None:
    m.start_soon()
    await m.until_step("hypervisor")


@pytest.mark.parametrize("main", [start, start_and_pause, start_and_begin_to_stop])
async def test_a_loop_that_ends_shuts_the_guest_down(machines: tiny.Machines, main: Any) -> None:
    """The end of the event loop shuts the guest down."""
    m = await asyncio.to_thread(in_a_thread, machines.options(), main)
    assert m.state == "Stopped"
    assert m.events[0] == "ready"
    assert m.events[-1] == "close"
    assert "the power button was pressed" in m.console()
    assert await machines.leftovers() == []


async def test_a_loop_that_ends_during_a_start(machines: tiny.Machines) -> None:
    """The end of the event loop during a start leaves nothing."""
    m = await asyncio.to_thread(in_a_thread, machines.options(), begin_to_start)
    assert m.events == ["close"]
    assert await machines.leftovers() == []
