"""Watch a machine from its first ready until its end, for dead helpers, reboots and full disks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from ovm.errors import GuestError, OVMError
from ovm.hypervisors import Happening
from ovm.machine import health
from ovm.machine.boot import find_panic, halt_error
from ovm.machine.collaborators import Collaborators
from ovm.machine.context import Context, log_failure, overtake
from ovm.machine.pause import PauseControl
from ovm.machine.readiness import Readiness
from ovm.machine.repair import NetworkRepair
from ovm.machine.reports import HALTS, Reports
from ovm.machine.running import Session
from ovm.model.states import VMState
from ovm.process.child import Child
from ovm.process.supervise import first_exit

log = logging.getLogger(__name__)


class Watch:
    """Watches one session."""

    def __init__(
        self,
        session: Session,
        *,
        context: Context,
        reports: Reports,
        readiness: Readiness,
        repair: NetworkRepair,
        pause: PauseControl,
        collaborators: Collaborators,
    ) -> None:
        self._session = session
        self._context = context
        self._reports = reports
        self._readiness = readiness
        self._repair = repair
        self._pause = pause
        self._collaborators = collaborators
        self._rebooting: asyncio.Task[None] | None = None
        self._healing: asyncio.Task[None] | None = None
        self._dead: Child | None = None
        """The gvproxy that is being replaced."""

    async def until_the_end(self) -> None:
        """Return once a stop was requested or the guest powered off.

        Raises:
            OVMError: a helper ended, and the machine cannot survive.
        """
        self._death = asyncio.create_task(first_exit(self._session.children))
        self._report = asyncio.create_task(self._reports.while_running.get())
        stop = asyncio.create_task(self._context.stop.wanted.wait())
        try:
            while True:
                waits = {task for task in (stop, *self._tasks()) if task is not None}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if stop.done():  # first: other ends are no failure once a stop was requested
                    return
                if self._death.done() and not await self._survives(self._death.result()):
                    return
                if self._healing is not None and self._healing.done():
                    self._end_healing(self._healing)
                if self._rebooting is not None and self._rebooting.done():
                    self._end_reboot(self._rebooting)
                if self._report.done():
                    what, words = self._report.result()
                    self._report = asyncio.create_task(self._reports.while_running.get())
                    await self._act_on(what, words)
        finally:
            for task in (stop, *self._tasks()):
                if task is not None:
                    task.cancel()
                    task.add_done_callback(log_failure)

    def _tasks(self) -> tuple[asyncio.Task[Any] | None, ...]:
        return self._death, self._report, self._rebooting, self._healing

    async def _survives(self, noticed: Child) -> bool:
        """Handle the death of a helper: start a repair if possible. Return whether the machine survives."""
        culprit = await self._collaborators.blame(self._session, noticed)
        if culprit in self._session.children:  # otherwise a reboot has replaced it already
            if not await self._repair.can_heal(self._session, culprit):
                return False
            if self._rebooting is None or self._rebooting.done():  # a reboot repairs it itself, in its own order
                self._dead, self._healing = culprit, asyncio.create_task(self._repair.heal(culprit))
        self._death = asyncio.create_task(first_exit(c for c in self._session.children if c is not culprit))
        return True

    def _end_healing(self, healing: asyncio.Task[None]) -> None:
        self._dead = self._healing = None
        healing.result()
        self._watch_all()

    def _end_reboot(self, rebooting: asyncio.Task[None]) -> None:
        self._rebooting = None
        rebooting.result()
        if self._healing is None:
            self._watch_all()

    def _watch_all(self) -> None:
        self._death.cancel()
        self._death = asyncio.create_task(first_exit(self._session.children))

    async def _act_on(self, what: Happening, words: str) -> None:
        if what is Happening.REBOOTED:
            # the reboot restores the network again: two repairs at once would end each other's gvproxy
            await overtake((self._rebooting, self._healing))
            self._rebooting = asyncio.create_task(self._reboot(self._dead))
            self._dead = self._healing = None
        elif what is Happening.FAILED and self._rebooting is not None:
            self._context.stop.forced.set()  # a guest that is stopped cannot shut down
            raise await halt_error(self._session, what, words)
        elif what in HALTS:
            self._halt(what, words)

    async def _reboot(self, dead_gvproxy: Child | None) -> None:
        """Handle a reboot of the guest. Replace ``dead_gvproxy`` first, and each gvproxy that dies meanwhile."""
        self._context.begin_boot()
        if panic := await find_panic(self._session):
            self._context.events.emit("error", panic)
        try:
            # before the ports are closed: closing them would wait for the new gvproxy
            if dead_gvproxy is not None:
                await self._repair.heal(dead_gvproxy)
            await self._session.guest_was_reset()
            await self._boot_by_any_gvproxy()
        except Exception:
            self._context.stop.forced.set()  # a guest that has not booted cannot shut down
            raise
        self._context.to(VMState.RUNNING)
        self._context.events.emit("ready")

    async def _boot_by_any_gvproxy(self) -> None:
        while True:
            gvproxy = self._session.network.child
            try:
                await self._readiness.boot(self._session)
            except Exception:
                if not await self._repair.was_the_cause(self._session, gvproxy):
                    raise
            else:
                return
            await self._repair.heal(gvproxy)

    def _halt(self, what: Happening, words: str) -> None:
        """Handle a guest that its hypervisor has stopped by itself."""
        self._context.to(VMState.ERROR)
        hint = "call stop(), then read the hypervisor's log"
        if what is Happening.OUT_OF_SPACE:
            hint = "make room on the host's disk; the machine then resumes by itself, or at once with vm_resume()"
        error = GuestError(f"the hypervisor stopped the guest: {words}", hint=hint)
        self._context.events.emit("error", error)
        if self._context.monitor is not None:
            self._context.monitor.set_problems(error.message)
        if what is Happening.OUT_OF_SPACE:
            self._context.in_background(self._resume_with_room())

    async def _resume_with_room(self) -> None:
        """Resume the guest once the host has room for its writes, unless the user resumes or stops it first."""
        while self._context.state is VMState.ERROR:
            if await health.has_room(self._context.prepared.options):
                with contextlib.suppress(OVMError):
                    await self._pause.resume_unasked()
                return
            await asyncio.sleep(self._collaborators.room_again_s)
