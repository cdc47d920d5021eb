"""What docs/vfkit.md says of vfkit beside gvproxy and no other test shows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

import ovm
import tiny
import under

pytestmark = [pytest.mark.tiny, under.VFKIT_ALONE]


async def test_the_machine_ends_before_its_network(machines: tiny.Machines) -> None:
    """gvproxy is there until vfkit has gone, however the machine is stopped."""
    m = await machines()
    for force in (False, True):
        await m.ovm.start()
        ended: list[str] = []
        assert m.ovm._context.session is not None

        async def note(name: str, end: Callable[[], Awaitable[object]], ended: list[str] = ended) -> None:
            await end()
            ended.append(name)

        waits = [asyncio.create_task(note(child.name, child.wait)) for child in m.ovm._context.session.children]
        await m.ovm.stop(force=force)
        await asyncio.wait(waits)
        assert [name for name in ended if name != "guard"] == ["vfkit", "gvproxy"]


async def test_a_machine_that_runs_is_left_alone(machines: tiny.Machines) -> None:
    """vfkit writes a line for each question to its REST; nobody asks unless there is something to know."""
    m = await machines()
    async with m.ovm:
        log = m.ovm.options.log_dir / "vfkit.log"
        asked = log.read_text().count("[GIN]")
        await asyncio.sleep(2)  # measured: the time in which nobody asks
        assert log.read_text().count("[GIN]") == asked
        await m.ovm.vm_state()
        assert log.read_text().count("[GIN]") == asked + 1


WORDS = 'Error Domain=VZErrorDomain Code=2 Description="Invalid virtual machine configuration."'


async def test_vfkits_last_words_are_told(machines: tiny.Machines) -> None:
    """Not "exit status 1" alone: what it said before is in the error."""
    vfkit = machines.root / "failing"
    vfkit.write_text(
        f"#!/bin/sh\n[ \"$1\" != --version ] || {{ echo 'vfkit version: v0.6.4'; exit; }}\necho '{WORDS}' >&2\nexit 1\n"
    )
    vfkit.chmod(0o755)
    machines.vfkit = vfkit
    m = await machines()
    with pytest.raises(ovm.HelperExited) as caught:
        await m.ovm.start()
    error = caught.value
    assert (error.message, error.stage) == ("vfkit ended unexpectedly", "hypervisor")
    assert (error.exit_reason, error.log_tail) == ("exit status 1", (WORDS,))
    assert m.events == ["error", "close"]


async def test_sockets_that_were_swept_away_hurt_nobody(machines: tiny.Machines) -> None:
    """Whatever cleans temporary directories may take them: the guest is shut down all the same, and starts again."""
    m = await machines()
    await m.ovm.start()
    for path in m.ovm.options.socket_dir.iterdir():
        if path.is_socket():
            path.unlink()
    assert (await m.ovm.vm_state()).state == "VirtualMachineStateRunning"
    await m.ovm.stop(timeout_s=1.0)  # nobody hears REST; then SIGTERM presses the button
    assert "the power button was pressed" in m.console()
    async with m.ovm:
        assert m.events == ["ready", "close", "ready"]
