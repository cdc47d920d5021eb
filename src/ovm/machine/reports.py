"""Reports of the hypervisor during one run of a machine, delivered to the tasks that wait for them."""

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
"""Reports that the hypervisor has stopped the guest by itself."""
_TROUBLE = HALTS | {Happening.DISK_ERROR}


class Reports:
    """The reports of one run."""

    def __init__(self, context: Context, *, last_report_wait_s: float) -> None:
        self._context = context
        self._last_report_wait_s = last_report_wait_s
        self._powered_off = asyncio.Event()
        self.trouble = ""
        """The last report that may keep the guest from getting ready or shutting down; empty if there is none."""
        self.while_running: asyncio.Queue[tuple[Happening, str]] = asyncio.Queue()
        """Reports on a guest that was ready."""
        self._begin_boot()

    def _begin_boot(self) -> None:
        self.was_reset = asyncio.Event()
        """Set when the guest resets itself during this boot, after its first message or during the first boot."""
        self.halted: asyncio.Queue[tuple[Happening, str]] = asyncio.Queue()
        """A halt before the guest's first ready."""

    async def guest_powered_off(self, ended: Child) -> bool:
        """Return whether the guest powered itself off; a terminated QEMU ends with the same exit status."""
        if ended.process.returncode != 0:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._last_report_wait_s):  # QEMU's last report may be read after its death
                await self._powered_off.wait()
        return self._powered_off.is_set()

    def hear(self, what: Happening, words: str) -> None:
        """Handle a report of the hypervisor."""
        self._note_trouble(what, words)
        if what in HALTS:
            self._note_halt(what, words)
        if what is Happening.POWERED_OFF:
            self._powered_off.set()
        if what is Happening.DISK_ERROR or (what is Happening.REBOOTED and not self._is_reboot()):
            return
        self.while_running.put_nowait((what, words))

    def _note_trouble(self, what: Happening, words: str) -> None:
        if what is Happening.DISK_ERROR and not self.trouble:  # log it once: there may be one for each request
            log.warning("%s; the guest runs on", words)
        if what is Happening.RESUMED:
            self.trouble = ""
        if what in _TROUBLE:
            self.trouble = words

    def _note_halt(self, what: Happening, words: str) -> None:
        # while_running has it too, because the guest may get ready before the boot notices
        if self._context.session is None:
            self.halted.put_nowait((what, words))
        if self._context.state is VMState.STOPPING:
            if not self._context.stop.forced.is_set():
                log.warning("the guest cannot shut down: %s", words)
            self._context.stop.forced.set()

    def _is_reboot(self) -> bool:
        """Return whether a reset begins a boot of a guest that was ready; then the machine is starting."""
        session = self._context.session
        # One reboot makes several resets, slowly on a slow host: the kernel tries every method it has, and SeaBIOS
        # starts over when it runs a second time. So a reset before a reboot's first message is not a crash.
        if self._context.state is VMState.STARTING and (session is None or session.channel.stages):
            self.was_reset.set()
        if session is None or self._context.state is not VMState.RUNNING:
            return False  # a machine that is ending ignores a reset
        self._begin_boot()
        session.channel.expect_boot()  # before any await: the boot's first message may arrive next
        self._context.to(VMState.STARTING)
        return True
