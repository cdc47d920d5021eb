"""From a virtual machine that runs to none: ask the guest to power off, ask louder, cut the power."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ovm.errors import OVMError
from ovm.machine.running import Session
from ovm.model.defaults import STOP_TIMEOUT_S
from ovm.process import logs
from ovm.process.threads import in_thread

log = logging.getLogger(__name__)

POWER_BUTTON_AFTER_S = 15.0
"""When a guest that was asked over ssh and is still there hears the power button too, and how often."""
POWER_BUTTON_RETRY_S = 2.0
POWER_BUTTON_TRIES = 5
"""How often in a row a button may be out of reach before the power is cut."""
FORCE_TIMEOUT_S = 5.0
DISK_TROUBLE = re.compile(r"I/O error|BTRFS(?: error| critical|: error)|EXT4-fs error")
"""What the guest's kernel writes to the console when a disk has failed it."""
CONSOLE_LINES = 100
"""How far from the end of the console a disk's failure is looked for."""


@dataclass(frozen=True, kw_only=True)
class Shutdown:
    """How a guest is to be shut down."""

    tell: Callable[[str], None]
    """Called with each step, in words for people."""
    force_wanted: asyncio.Event
    trouble: Callable[[], str] = str
    """What the hypervisor has reported that may keep the guest from it; empty if nothing."""
    timeout_s: float = STOP_TIMEOUT_S


async def cut_power(session: Session) -> None:
    """End a paused guest whose state is saved; nothing is requested of it."""
    # before the power is cut: whoever waits for a helper's end must not take this one for a failure
    for child in session.children:
        child.expected = True
    await session.vm.force_stop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FORCE_TIMEOUT_S):
            await session.vm.child.wait()


async def shut_down(session: Session, how: Shutdown) -> None:
    """Ask, ask louder, cut the power. The helpers that hang on the hypervisor may end with it."""
    try:
        await _shut_down(session, how)
    except asyncio.CancelledError:  # the event loop is ending in the midst of it: what was begun is finished
        await _shut_down(session, how)
        raise


async def _shut_down(session: Session, how: Shutdown) -> None:
    for child in session.children:
        child.expected = True
    vm = session.vm
    if not vm.child.running:
        return
    gone = asyncio.create_task(vm.child.wait())
    force = asyncio.create_task(how.force_wanted.wait())
    asking = asyncio.create_task(_ask_to_power_off(session, how))
    began = time.monotonic()
    try:
        await asyncio.wait({gone, force}, timeout=how.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            if force.done() and not asking.done():
                reason = how.trouble() or "as was asked"
            else:
                reason = f"it has not shut down within {how.timeout_s:g} s"
                if force.done():
                    reason = "it cannot be asked to shut down"
                if trouble := how.trouble() or await _disk_trouble(session):
                    reason = f"{reason}; {trouble}"
            log.warning("cutting the guest's power after %.1f s: %s", time.monotonic() - began, reason)
            how.tell(f"cutting the guest's power: {reason}")
            asking.cancel()  # before: it would press the button of a hypervisor that is ending
            await vm.force_stop()
            await asyncio.wait({gone}, timeout=FORCE_TIMEOUT_S)
        elif vm.child.process.returncode != 0:
            log.warning("%s ended before the guest had shut down: %s", vm.child.name, vm.child.exit_reason)
    finally:
        for task in (gone, force, asking):
            task.cancel()
        await asyncio.wait({gone, force, asking})  # none of them may still use the session that is closed next


async def _disk_trouble(session: Session) -> str:
    """What the guest's console says of a disk that failed since it was ready; empty if nothing."""
    console = await in_thread(partial(logs.tail, session.console_log, CONSOLE_LINES, since=session.console_read))
    told = [line for line in console if DISK_TROUBLE.search(line)]
    return f"the guest's console says: {told[-1]}" if told else ""


async def _ask_to_power_off(session: Session, how: Shutdown) -> None:
    """Until the guest is gone; gives up, and wants the power cut, if there is no way to ask."""
    with contextlib.suppress(OVMError):
        await session.vm.resume()  # a paused guest hears nothing
    if (command := session.profile.power_off) and not how.force_wanted.is_set():
        how.tell("asking the guest to shut down")
        with contextlib.suppress(OVMError):
            await session.ssh.exec(command, timeout_s=POWER_BUTTON_AFTER_S)
            await asyncio.sleep(POWER_BUTTON_AFTER_S)
    unheard = 0
    while unheard < POWER_BUTTON_TRIES:  # a press that comes before the guest listens is lost
        how.tell("pressing the guest's power button")
        unheard = 0 if await session.vm.request_stop() else unheard + 1
        await asyncio.sleep(POWER_BUTTON_AFTER_S if not unheard else POWER_BUTTON_RETRY_S)
    how.force_wanted.set()
