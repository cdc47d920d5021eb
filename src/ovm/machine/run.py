"""One run of a machine, from power-on to power-off."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from ovm.disks.saved_state import Unfit
from ovm.errors import OVMError, PortError, StartError, first_error
from ovm.machine.collaborators import Collaborators
from ovm.machine.context import Context
from ovm.machine.monitor import Monitor
from ovm.machine.outcome import Ending, Outcome
from ovm.machine.pause import PauseControl
from ovm.machine.readiness import Readiness
from ovm.machine.repair import NetworkRepair
from ovm.machine.reports import Reports
from ovm.machine.running import Session
from ovm.machine.shutdown import Shutdown
from ovm.machine.suspend import Recall
from ovm.machine.watch import Watch
from ovm.model.defaults import STOP_TIMEOUT_S
from ovm.model.info import Health
from ovm.model.states import VMState

log = logging.getLogger(__name__)


class Run:
    """Boots or resumes the guest, watches it while it runs, and shuts it down."""

    def __init__(
        self,
        context: Context,
        pause: PauseControl,
        collaborators: Collaborators,
        *,
        ready: asyncio.Future[None],
        timeout_s: float,
        resume: bool,
        kernel_was_retried: bool,
    ) -> None:
        self._context = context
        self._pause = pause
        self._collaborators = collaborators
        self._ready = ready
        self._resume_wanted = resume
        self._reports = Reports(context, last_report_wait_s=collaborators.blame_wait_s)
        self._repair = NetworkRepair(context, self._reports, collaborators)
        self._readiness = Readiness(
            context, self._reports, collaborators, timeout_s=timeout_s, kernel_was_retried=kernel_was_retried
        )

    async def outcome(self) -> Outcome:
        """Run the machine until it is stopped."""
        error: BaseException | None = None
        cancelled = False
        try:
            await self._live()
        except asyncio.CancelledError:
            cancelled = True
            if self._context.stop.wanted.is_set() and not self._ready.done():
                error = StartError("the machine was stopped before it was ready")
        except BaseExceptionGroup as group:
            error = first_error(group)
        except Exception as failure:  # noqa: BLE001 - reported to start()'s caller or to the listeners
            error = failure
            if isinstance(failure, OSError) and not self._ready.done():
                error = StartError(f"a file or socket cannot be used: {failure}")
                error.__cause__ = failure
        self._context.end_background()
        self._context.session = self._context.monitor = None
        self._context.to(VMState.STOPPED)
        if error is not None and not isinstance(error, OVMError):
            log.error("the machine failed", exc_info=error)
        return Outcome(self._ending(error, cancelled=cancelled), self._collaborators.clock(), error)

    def _ending(self, error: BaseException | None, *, cancelled: bool) -> Ending:
        if cancelled or self._context.stop.wanted.is_set():
            return Ending.STOPPED
        if self._readiness.kernel_fell:
            return Ending.KERNEL_FELL
        if isinstance(error, Unfit):
            return Ending.NOT_RESUMED
        if self._repair.network_is_lost:
            return Ending.NETWORK_LOST
        return Ending.POWERED_OFF if error is None else Ending.FAILED

    async def _live(self) -> None:
        context, collaborators = self._context, self._collaborators
        async with contextlib.AsyncExitStack() as stack:
            recall = Recall(wanted=self._resume_wanted, given_up=self._boot_instead)
            session = await stack.enter_async_context(
                collaborators.power_on(
                    context.prepared, recall=recall, step=context.step_done, watcher=self._reports.hear
                )
            )
            if context.prepared.options.pause_on_sleep:
                await stack.enter_async_context(
                    collaborators.watch_power(self._pause.before_sleep, self._pause.after_wake)
                )
            if recall.record is None:
                await self._readiness.boot(session)
            else:
                await self._readiness.resume(session, recall)
            self._become_ready(session)
            try:
                await Watch(
                    session,
                    context=context,
                    reports=self._reports,
                    readiness=self._readiness,
                    repair=self._repair,
                    pause=self._pause,
                    collaborators=collaborators,
                ).until_the_end()
            finally:
                # also when the event loop is ending, which waits for this task
                await self._shut_down(session)

    def _boot_instead(self, why: str) -> None:
        self._context.not_resumed = why
        self._context.to(VMState.STARTING)

    def _become_ready(self, session: Session) -> None:
        context = self._context
        context.session = session
        session.on_refused = self._report_refused
        context.monitor = Monitor(
            session, context.prepared.driver, is_running=context.is_running, changed=self._tell_health
        )
        context.to(VMState.RUNNING)
        context.events.emit("ready")
        self._ready.set_result(None)
        context.look_after(session)

    def _report_refused(self, error: PortError) -> None:
        self._context.events.emit("error", error)
        self._context.in_background(self._look_at_containers())

    async def _look_at_containers(self) -> None:
        """Look again once the guest knows whether a container waits for a refused port."""
        await asyncio.sleep(self._collaborators.refused_look_s)
        if self._context.monitor is not None:
            self._context.monitor.look_soon()

    async def _shut_down(self, session: Session) -> None:
        """Shut the guest down; if its state is saved, only cut its power."""
        # first: a save that ended later would resume a guest during its shutdown, or keep an outdated state
        await self._pause.give_up_saving()
        self._context.end_background()  # before the guest closes connections, which these tasks would reopen
        if self._pause.is_suspended:
            await self._collaborators.cut_power(session)
            return
        self._context.to(VMState.STOPPING)
        stop = self._context.stop
        await self._collaborators.shut_down(
            session,
            Shutdown(
                tell=self._tell_step,
                force_wanted=stop.forced,
                trouble=lambda: self._reports.trouble,
                timeout_s=STOP_TIMEOUT_S if stop.timeout_s is None else stop.timeout_s,
            ),
        )

    def _tell_step(self, step: str) -> None:
        log.info("stopping: %s", step)
        self._context.report_progress(step)

    def _tell_health(self, now: Health) -> None:
        self._context.events.emit("health", health=now)
