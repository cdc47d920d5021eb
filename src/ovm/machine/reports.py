"""What the hypervisor reports during one run of a machine, handed to whatever waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from ovm.hypervisors import Happening
from ovm.machine.context import Context
from ovm.model.states import VMState
from ovm.process.child import Child

log = logging.getLogger(__name__)

HALTS = frozenset({Happening.FAILED, Happening.OUT_OF_SPACE})
"""The hypervisor has stopped the guest on its own account."""
_TROUBLE = HALTS | {Happening.DISK_ERROR}


class Reports:
    """The reports of one run."""

    def __init__(self, context: Context, *, last_report_wait_s: float) -> None:
        self._context = context
        self._last_report_wait_s = last_report_wait_s
        self._powered_off = asyncio.Event()
        self.trouble = ""
        """What was reported that may keep the guest from its ready or its shutdown; empty if nothing."""
        self.while_running: asyncio.Queue[tuple[Happening, str]] = asyncio.Queue()
        """What concerns a guest that was ready."""
        self._begin_boot()

    def _begin_boot(self) -> None:
        self.was_reset = asyncio.Event()
        """Set when the guest resets itself during this boot, after its first message or during the first boot."""
        self.halted: asyncio.Queue[tuple[Happening, str]] = asyncio.Queue()
        """A halt before the guest's first ready."""

    async def guest_powered_off(self, ended: Child) -> bool:
        """Return whether the guest itself did it; a QEMU that somebody terminated ends with the same status."""
        if ended.process.returncode != 0:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._last_report_wait_s):  # QEMU's last report may be read after its death
                await self._powered_off.wait()
        return self._powered_off.is_set()

    def hear(self, what: Happening, words: str) -> None:
        """Take a report of the hypervisor."""
        self._note_trouble(what, words)
        if what in HALTS:
            self._note_halt(what, words)
        if what is Happening.POWERED_OFF:
            self._powered_off.set()
        if what is Happening.DISK_ERROR or (what is Happening.REBOOTED and not self._is_reboot()):
            return
        self.while_running.put_nowait((what, words))

    def _note_trouble(self, what: Happening, words: str) -> None:
        if what is Happening.DISK_ERROR and not self.trouble:  # once is enough: there may be one for each request
            log.warning("%s; the guest runs on", words)
        if what is Happening.RESUMED:
            self.trouble = ""
        if what in _TROUBLE:
            self.trouble = words

    def _note_halt(self, what: Happening, words: str) -> None:
        # also reported as while_running, because the guest may be ready before the boot notices
        if self._context.session is None:
            self.halted.put_nowait((what, words))
        if self._context.state is VMState.STOPPING:
            if not self._context.stop.forced.is_set():
                log.warning("the guest cannot shut down: %s", words)
            self._context.stop.forced.set()

    def _is_reboot(self) -> bool:
        """Return whether a reset begins a boot of a guest that was ready; then the machine is starting."""
        session = self._context.session
        # One reboot makes several resets, at their own pace on a slow host: the kernel tries every way it knows,
        # and SeaBIOS, run a second time, starts over. So a boot that has not said a word yet has not fallen.
        if self._context.state is VMState.STARTING and (session is None or session.channel.stages):
            self.was_reset.set()
        if session is None or self._context.state is not VMState.RUNNING:
            return False  # on its way out, a reset changes nothing for us
        self._begin_boot()
        session.channel.expect_boot()  # now, not later: its first line may be the next thing to arrive
        self._context.to(VMState.STARTING)
        return True
