"""Shutdown of a virtual machine: request a power-off, press the power button, cut the power."""

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
"""Time after the request over ssh until the power button is pressed, and between two presses."""
POWER_BUTTON_RETRY_S = 2.0
POWER_BUTTON_TRIES = 5
"""Number of consecutive failed presses after which the power is cut."""
FORCE_TIMEOUT_S = 5.0
DISK_TROUBLE = re.compile(r"I/O error|BTRFS(?: error| critical|: error)|EXT4-fs error")
"""Console lines of the guest's kernel about a failed disk."""
CONSOLE_LINES = 100
"""Number of last console lines to search for a failed disk."""


@dataclass(frozen=True, kw_only=True)
class Shutdown:
    """Parameters of a shutdown."""

    tell: Callable[[str], None]
    """Called with each step, as text for people."""
    force_wanted: asyncio.Event
    trouble: Callable[[], str] = str
    """Returns the hypervisor's report that may explain a failed shutdown; empty if there is none."""
    timeout_s: float = STOP_TIMEOUT_S


async def cut_power(session: Session) -> None:
    """Cut the power of a paused guest whose state is saved."""
    # before the power is cut: tasks that wait for the end of a helper must not take it for a failure
    for child in session.children:
        child.expected = True
    await session.vm.force_stop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FORCE_TIMEOUT_S):
            await session.vm.child.wait()


async def shut_down(session: Session, how: Shutdown) -> None:
    """Shut the guest down, or cut its power. Helpers that depend on the hypervisor may end with it."""
    try:
        await _shut_down(session, how)
    except asyncio.CancelledError:  # the event loop is ending: complete the shutdown first
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
                reason = how.trouble() or "as requested"
            else:
                reason = f"it has not shut down within {how.timeout_s:g} s"
                if force.done():
                    reason = "no shutdown request reaches it"
                if trouble := how.trouble() or await _disk_trouble(session):
                    reason = f"{reason}; {trouble}"
            log.warning("cutting the guest's power after %.1f s: %s", time.monotonic() - began, reason)
            how.tell(f"cutting the guest's power: {reason}")
            asking.cancel()  # before the power is cut: it would press the button of a hypervisor that is ending
            await vm.force_stop()
            await asyncio.wait({gone}, timeout=FORCE_TIMEOUT_S)
        elif vm.child.process.returncode != 0:
            log.warning("%s ended before the guest had shut down: %s", vm.child.name, vm.child.exit_reason)
    finally:
        for task in (gone, force, asking):
            task.cancel()
        await asyncio.wait({gone, force, asking})  # await all: the session is closed next, and none may still use it


async def _disk_trouble(session: Session) -> str:
    """Return the console's last message about a disk that failed since the guest was ready; empty if none."""
    console = await in_thread(partial(logs.tail, session.console_log, CONSOLE_LINES, since=session.console_read))
    told = [line for line in console if DISK_TROUBLE.search(line)]
    return f"the guest's console shows: {told[-1]}" if told else ""


async def _ask_to_power_off(session: Session, how: Shutdown) -> None:
    """Request a power-off until cancelled; if no request reaches the guest, have its power cut."""
    with contextlib.suppress(OVMError):
        await session.vm.resume()  # a paused guest cannot react
    if (command := session.profile.power_off) and not how.force_wanted.is_set():
        how.tell("requesting a shutdown of the guest")
        with contextlib.suppress(OVMError):
            await session.ssh.exec(command, timeout_s=POWER_BUTTON_AFTER_S)
            await asyncio.sleep(POWER_BUTTON_AFTER_S)
    unheard = 0
    while unheard < POWER_BUTTON_TRIES:  # press repeatedly: a press before the guest listens is lost
        how.tell("pressing the guest's power button")
        unheard = 0 if await session.vm.request_stop() else unheard + 1
        await asyncio.sleep(POWER_BUTTON_AFTER_S if not unheard else POWER_BUTTON_RETRY_S)
    how.force_wanted.set()
