"""Pause, resume and suspend: at a user's request or for the host's sleep; a resume also sets the guest's clock."""

from __future__ import annotations

import asyncio

from ovm.errors import OVMError, StateError
from ovm.machine.context import Context
from ovm.machine.running import Session
from ovm.machine.suspend import save
from ovm.model.results import ClockSync
from ovm.model.states import VMState


class PauseControl:
    """Pauses and resumes a machine, one change at a time.

    A change that has begun completes even if its caller is cancelled.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._turn = asyncio.Lock()
        self._syncing: asyncio.Task[ClockSync] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._asleep = False
        """Whether the host's sleep has paused the machine, or is about to."""
        self.is_suspended = False
        """Whether the guest's state is saved, so that no shutdown is needed."""

    def begin(self) -> None:
        """Reset what an earlier run recorded."""
        self._asleep = self.is_suspended = False

    async def pause(self) -> None:
        """Pause the machine, as :meth:`ovm.OVM.vm_pause` documents."""
        self._asleep = False
        await self._context.run_to_end(self._pause())

    async def resume(self) -> None:
        """Resume the machine, as :meth:`ovm.OVM.vm_resume` documents."""
        self._asleep = False
        await self._context.run_to_end(self._resume())

    async def resume_unasked(self) -> None:
        """Resume without a user's request: if the host's sleep paused the guest, it is still recorded as the cause."""
        await self._context.run_to_end(self._resume())

    async def suspend(self, timeout_s: float) -> None:
        """Save the guest's state and end the run."""
        await self._context.run_to_end(self._suspend(timeout_s))

    async def give_up_saving(self) -> None:
        """Cancel a save in progress; what it has written is deleted."""
        if self._saving is not None and not self.is_suspended:
            self._saving.cancel()
            await asyncio.wait({self._saving})

    async def clocksync(self) -> ClockSync:
        """Set the guest's clock, as :meth:`ovm.OVM.clocksync` documents."""
        session = self._context.require_managed("clocksync")
        result = await session.sync_clock()
        self._context.in_background(session.kick_chrony())
        return result

    async def before_sleep(self) -> None:
        """Pause the guest: one that runs during the host's sleep wakes with a wrong clock, and on macOS may hang."""
        if self._asleep or self._context.state in {VMState.RUNNING, VMState.RESUMING}:
            self._asleep = True  # before the await: the caller may give up waiting, but the pause continues
            await self._context.run_to_end(self._pause())

    async def after_wake(self) -> None:
        """Resume the guest unless its user had paused it, and set its clock."""
        ran = self._context.state is VMState.RUNNING
        if self._asleep:
            await self._context.run_to_end(self._resume())  # waits for a pause that may still be in progress
            self._asleep = False
        session = self._context.session
        if ran and self._context.state is VMState.RUNNING and session is not None and session.profile.engine:
            await self.clocksync()
        if self._context.monitor is not None:
            self._context.monitor.look_soon()  # gvproxy may hang, or the network may have changed

    async def _pause(self) -> None:
        if self._syncing is not None:  # the sync of a resume must not delay the pause
            self._syncing.cancel()
        async with self._turn:
            if self._context.state is VMState.PAUSED:
                return
            session = self._context.require_running("vm_pause")
            self._context.to(VMState.PAUSING)
            try:
                await session.vm.pause()
            except OVMError:
                if self._context.state is VMState.PAUSING:
                    self._context.to(VMState.RUNNING)
                raise
            if self._context.state is not VMState.PAUSING:  # it was stopped or failed meanwhile
                self._context.refuse("vm_pause")
            self._context.to(VMState.PAUSED)
            self._context.events.emit("vmPause")

    async def _resume(self) -> None:
        async with self._turn:
            session = self._context.require({VMState.RUNNING, VMState.PAUSED, VMState.ERROR}, "vm_resume")
            before = VMState.PAUSED if self._context.state is VMState.RUNNING else self._context.state
            if self._context.state is VMState.RUNNING:
                if await session.vm.state() not in {VMState.PAUSING, VMState.PAUSED}:
                    return
                self._context.require_running("vm_resume")
                self._context.to(VMState.PAUSED)  # a pause was given up, but the hypervisor paused after all
                self._context.events.emit("vmPause")
            self._context.to(VMState.RESUMING)
            try:
                await session.vm.resume()
            except OVMError:
                if self._context.state is VMState.RESUMING:
                    self._context.to(before)
                raise
            if self._context.state is not VMState.RESUMING:  # it was stopped or failed while the hypervisor resumed it
                self._context.refuse("vm_resume")
            self._context.to(VMState.RUNNING)
            try:
                if session.profile.engine:
                    await self._sync_after_resume(session)
            finally:
                self._context.events.emit("vmResume")
                if self._context.monitor is not None:
                    # not before: a health check would delay the guest's answer about its clock
                    self._context.monitor.look_soon()

    async def _sync_after_resume(self, session: Session) -> None:
        self._syncing = asyncio.create_task(session.sync_clock())
        try:
            await asyncio.wait({self._syncing})
            if not self._syncing.cancelled():
                self._syncing.result()
                self._context.in_background(session.kick_chrony())
        finally:
            self._syncing.cancel()
            self._syncing = None

    async def _suspend(self, timeout_s: float) -> None:
        async with self._turn:
            session = self._context.require({VMState.RUNNING, VMState.PAUSED}, "suspend")
            before = self._context.state
            self._context.to(VMState.SAVING)
            self._saving = asyncio.current_task()
            self._context.end_background()  # before the save: its tasks would reconnect
            try:
                await save(session, runs=before is VMState.RUNNING, timeout_s=timeout_s)
            except BaseException as error:
                if self._context.state is VMState.SAVING:
                    self._context.to(before)
                    self._context.look_after(session)
                    if session.profile.engine and before is VMState.RUNNING:
                        # the suspend may have cancelled it
                        self._context.in_background(session.settle())
                if isinstance(error, asyncio.CancelledError):
                    raise StateError("suspend: the machine was stopped meanwhile") from None
                raise
            finally:
                self._saving = None
            if self._context.state is not VMState.SAVING:  # the hypervisor stopped the guest while it was saved
                self._context.refuse("suspend")
            self.is_suspended = True
            self._context.stop.wanted.set()
