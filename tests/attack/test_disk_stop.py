"""B20: a disk that fails while a guest shuts down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ovm.hypervisors import Happening
from ovm.machine.collaborators import Collaborators
from ovm.machine.context import Context
from ovm.machine.pause import PauseControl
from ovm.machine.profiles import PROFILES
from ovm.machine.run import Run
from ovm.machine.shutdown import Shutdown, shut_down
from ovm.model.events import Events
from ovm.model.states import VMState
from ovm.process.child import Child

CONSOLE = (
    "[ 9.1] systemd-shutdown: Syncing\n"
    "[ 9.2] I/O error, dev vdb, sector 2048 op 0x1:(WRITE)\n"
    "[ 9.3] BTRFS error (device vdb): bdev /dev/vdb errs: wr 1, rd 0\n"
)


@pytest.fixture
async def session(tmp_path: Path) -> AsyncIterator[Any]:
    """A machine whose guest hears the power button and does nothing."""
    child = Child("qemu", await asyncio.create_subprocess_exec("sleep", "60"))
    console = tmp_path / "console.log"
    console.write_text("[ 1.0] I/O error, dev vdb: of an earlier start\n")

    async def heard() -> bool:
        return True

    async def force_stop() -> None:
        await child.end(grace_s=0)

    async def resume() -> None:
        pass

    yield SimpleNamespace(
        children=(child,),
        vm=SimpleNamespace(child=child, request_stop=heard, force_stop=force_stop, resume=resume),
        profile=PROFILES["bare"],
        console_log=console,
        console_read=console.stat().st_size,
    )
    await child.end(grace_s=0)


async def stopped(session: Any, **how: Any) -> list[str]:
    """What a person is shown of the stop."""
    shown: list[str] = []
    async with asyncio.timeout(10):
        await shut_down(
            session, Shutdown(tell=shown.append, **({"force_wanted": asyncio.Event(), "timeout_s": 0.05} | how))
        )
    return shown


async def test_the_console_names_the_cause(session: Any, caplog: pytest.LogCaptureFixture) -> None:
    """B20: a guest that hangs over a disk that fails is not only late: the log says what its kernel says."""
    with session.console_log.open("a") as console:
        console.write(CONSOLE)
    shown = await stopped(session)
    for told in (caplog.messages[-1], shown[-1]):
        assert "it has not shut down within 0.05 s; the guest's console shows: [ 9.3] BTRFS error" in told


async def test_the_hypervisor_names_the_cause(session: Any, caplog: pytest.LogCaptureFixture) -> None:
    """B20: what QEMU reports of a disk goes before what the console says."""
    shown = await stopped(session, trouble=lambda: "the disk ovm-data failed: Input/output error")
    for told in (caplog.messages[-1], shown[-1]):
        assert "within 0.05 s; the disk ovm-data failed: Input/output error" in told


async def test_a_guest_that_is_only_late_is_told_no_cause(session: Any, caplog: pytest.LogCaptureFixture) -> None:
    """B20: what the console said before the guest was ready is none of this stop's."""
    await stopped(session)
    assert caplog.messages[-1].endswith("it has not shut down within 0.05 s")


@pytest.mark.parametrize("what", [Happening.FAILED, Happening.OUT_OF_SPACE, Happening.DISK_ERROR])
async def test_a_stop_is_told_of_what_the_hypervisor_reports(
    what: Happening, caplog: pytest.LogCaptureFixture, session: Any
) -> None:
    """B20: a report that comes before or during the stop is in the log once, and is the reason of the power cut."""
    prepared: Any = SimpleNamespace(driver=None, options=None)
    context = Context(prepared, Events())
    context.stop.timeout_s = 0.05
    context.state = VMState.RUNNING
    run = Run(
        context,
        PauseControl(context),
        Collaborators(),
        ready=asyncio.Future(),
        timeout_s=1.0,
        resume=False,
        kernel_was_retried=False,
    )
    with contextlib.suppress(ExceptionGroup), caplog.at_level(logging.INFO):
        leaving = asyncio.create_task(run._shut_down(session))
        await asyncio.sleep(0)
        for _ in range(3):
            run._reports.hear(what, "the disk ovm-data failed: Input/output error")
        async with asyncio.timeout(10):
            await leaving
    cut = [line for line in caplog.messages if line.startswith("cutting the guest's power")]
    assert len(cut) == 1
    assert cut[0].endswith("the disk ovm-data failed: Input/output error")
    reported = [line for line in caplog.messages if "ovm-data failed" in line and "cutting" not in line]
    assert len(reported) == 1
