"""The machine of a service: what of all that goes wrong with it is what it failed of."""

from __future__ import annotations

import asyncio

import pytest

from ovm.errors import HelperExited, PortError
from ovm.model.events import Events
from ovm.model.states import VMState
from ovm.service.host import Host


class Machine:
    """As much of a machine as a service needs; the test ends it."""

    def __init__(self) -> None:
        self.state = VMState.STOPPED
        self.events = Events()
        self.on = self.events.on
        self.closed = asyncio.Event()

    async def start(self, *, progress) -> None:
        del progress
        self.state = VMState.RUNNING
        self.events.emit("ready")

    async def stop(self, **_) -> None:
        self.end()

    async def suspend(self, **_) -> None:
        self.end()

    async def wait_closed(self) -> None:
        await self.closed.wait()

    def end(self, error: Exception | None = None) -> None:
        self.state = VMState.STOPPED
        if error is not None:
            self.events.emit("error", error)
        self.events.emit("close")
        self.closed.set()


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
async def host(machine):
    """A service's host whose machine is ready; it has ended when the test is over."""

    async def make(_tell):
        return machine

    async def settle(_made):
        return []

    host = Host("dev", make, settle=settle, restart_needed=list)
    running = asyncio.create_task(host.run())
    async with asyncio.timeout(5):
        async for told in host.history.follow(0):
            if told.name == "ready":
                break
    yield host
    if not machine.closed.is_set():
        machine.end()
    async with asyncio.timeout(5):
        await running


async def power_off(machine: Machine) -> None:
    machine.end()


ENDS = {
    "a stop": lambda host, _: host.stop(),
    "a suspension": lambda host, _: host.suspend(timeout_s=1),
    "the guest's power off": lambda _, machine: power_off(machine),
}


@pytest.mark.parametrize("end", ENDS)
async def test_an_error_that_the_machine_survived_is_not_what_it_failed_of(host, machine, end):
    """A port that could not be reopened is reported, and an end without an error is no failure."""
    machine.events.emit("error", PortError("tcp port 8080 could not be opened again"))
    await ENDS[end](host, machine)
    assert host.died_of is None
    assert [told.name for told in host.history.known(0)][-2:] == ["error", "close"]


async def test_the_error_that_ended_the_machine_is_what_it_failed_of(host, machine):
    """Of two errors, the one that ended the machine is recorded."""
    fatal = HelperExited("qemu ended unexpectedly")
    machine.events.emit("error", PortError("tcp port 8080 could not be opened again"))
    machine.end(fatal)
    assert host.died_of is fatal


async def test_a_machine_that_was_started_again_has_not_failed(host, machine):
    """A machine that lost its network, restarted and was then stopped has not failed."""
    machine.state = VMState.STOPPED
    machine.events.emit("error", HelperExited("gvproxy ended unexpectedly"))
    machine.events.emit("close")
    machine.state = VMState.RUNNING
    machine.events.emit("ready")
    await host.stop()
    assert host.died_of is None
