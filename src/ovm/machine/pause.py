"""What makes a machine stand still and go on: a pause, a suspension, the host's sleep; and its clock after each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ovm.errors import OVMError, StateError
from ovm.machine.running import Session
from ovm.machine.suspend import save
from ovm.model.results import ClockSync
from ovm.model.states import VMState

if TYPE_CHECKING:
    from ovm.machine.lifecycle import Life


class Standstill:
    """Changes a life's state between running and standing still, one change at a time.

    Each is finished once begun, even if its caller is cancelled.
    """

    def __init__(self, life: Life) -> None:
        self._life = life
        self._turn = asyncio.Lock()
        self._syncing: asyncio.Task[ClockSync] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._asleep = False
        """Whether the host's sleep has paused it, or is about to."""
        self.is_suspended = False
        """Whether its memory is kept, so that there is nothing to shut down."""

    def begin(self) -> None:
        """Of an earlier life nothing is known any more."""
        self._asleep = self.is_suspended = False

    async def pause(self) -> None:
        """As :meth:`ovm.OVM.vm_pause` promises."""
        self._asleep = False
        await self._life.to_its_end(self._pause())

    async def resume(self) -> None:
        """As :meth:`ovm.OVM.vm_resume` promises."""
        self._asleep = False
        await self._life.to_its_end(self._resume())

    async def go_on(self) -> None:
        """The same of nobody's wish: a guest that the host's sleep has paused stays so."""
        await self._life.to_its_end(self._resume())

    async def suspend(self, timeout_s: float) -> None:
        """Keep the guest's memory, and have the life end."""
        await self._life.to_its_end(self._suspend(timeout_s))

    async def give_up_saving(self) -> None:
        """A memory that is still being written is not kept."""
        if self._saving is not None and not self.is_suspended:
            self._saving.cancel()
            await asyncio.wait({self._saving})

    async def clocksync(self) -> ClockSync:
        """As :meth:`ovm.OVM.clocksync` promises."""
        session = self._life.managed("clocksync")
        result = await session.sync_clock()
        self._life.in_background(session.kick_chrony())
        return result

    async def before_sleep(self) -> None:
        """A guest that runs into the host's sleep wakes with a clock that is wrong, and on macOS may hang."""
        if self._asleep or self._life.state in {VMState.RUNNING, VMState.RESUMING}:
            self._asleep = True  # before: who waits for us may give up, the pause goes on
            await self._life.to_its_end(self._pause())

    async def after_wake(self) -> None:
        """What its user had paused stays paused."""
        ran = self._life.state is VMState.RUNNING
        if self._asleep:
            await self._life.to_its_end(self._resume())  # behind a pause that may still be under way
            self._asleep = False
        session = self._life.session
        if ran and self._life.state is VMState.RUNNING and session is not None and session.profile.engine:
            await self.clocksync()
        if self._life.care is not None:
            self._life.care.look_soon()  # a gvproxy may hang since, or a network be another

    async def _pause(self) -> None:
        if self._syncing is not None:  # after a resume; its guest is not to run for that alone
            self._syncing.cancel()
        async with self._turn:
            if self._life.state is VMState.PAUSED:
                return
            session = self._life.running("vm_pause")
            self._life.to(VMState.PAUSING)
            try:
                await session.vm.pause()
            except OVMError:
                if self._life.state is VMState.PAUSING:
                    self._life.to(VMState.RUNNING)
                raise
            if self._life.state is not VMState.PAUSING:  # it was stopped, say, or failed meanwhile
                self._life.refuse("vm_pause")
            self._life.to(VMState.PAUSED)
            self._life.events.emit("vmPause")

    async def _resume(self) -> None:
        async with self._turn:
            session = self._life.in_({VMState.RUNNING, VMState.PAUSED, VMState.ERROR}, "vm_resume")
            before = VMState.PAUSED if self._life.state is VMState.RUNNING else self._life.state
            if self._life.state is VMState.RUNNING:
                if await session.vm.state() not in {VMState.PAUSING, VMState.PAUSED}:
                    return
                self._life.running("vm_resume")
                self._life.to(VMState.PAUSED)  # by a pause that was given up, and came about after all
                self._life.events.emit("vmPause")
            self._life.to(VMState.RESUMING)
            try:
                await session.vm.resume()
            except OVMError:
                if self._life.state is VMState.RESUMING:
                    self._life.to(before)
                raise
            if self._life.state is not VMState.RESUMING:
                self._life.refuse("vm_resume")
            self._life.to(VMState.RUNNING)
            try:
                if session.profile.engine:
                    await self._sync_after_resume(session)
            finally:
                self._life.events.emit("vmResume")
                if self._life.care is not None:
                    self._life.care.look_soon()  # not before: a look keeps the guest from telling its time at once

    async def _sync_after_resume(self, session: Session) -> None:
        self._syncing = asyncio.create_task(session.sync_clock())
        try:
            await asyncio.wait({self._syncing})
            if not self._syncing.cancelled():
                self._syncing.result()
                self._life.in_background(session.kick_chrony())
        finally:
            self._syncing.cancel()
            self._syncing = None

    async def _suspend(self, timeout_s: float) -> None:
        async with self._turn:
            session = self._life.in_({VMState.RUNNING, VMState.PAUSED}, "suspend")
            before = self._life.state
            self._life.to(VMState.SAVING)
            self._saving = asyncio.current_task()
            for task in self._life.background:  # they would connect again
                task.cancel()
            try:
                await save(session, runs=before is VMState.RUNNING, timeout_s=timeout_s)
            except BaseException as error:
                if self._life.state is VMState.SAVING:
                    self._life.to(before)
                    self._life.attend(session)
                    if session.profile.engine and before is VMState.RUNNING:
                        self._life.in_background(session.settle())  # which may not have been done
                if isinstance(error, asyncio.CancelledError):
                    raise StateError("suspend: the machine was stopped meanwhile") from None
                raise
            finally:
                self._saving = None
            if self._life.state is not VMState.SAVING:
                self._life.refuse("suspend")
            self.is_suspended = True
            self._life.stop_wanted.set()
