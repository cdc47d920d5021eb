"""Wait until the guest is ready, and fail as soon as it cannot become ready."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from ovm.disks.saved_state import Unfit
from ovm.errors import HelperExited, NotReadyError, OVMError, PortError, first_error
from ovm.machine.boot import boot_error, halt_error
from ovm.machine.collaborators import Collaborators
from ovm.machine.context import Context
from ovm.machine.reports import Reports
from ovm.machine.running import Session
from ovm.machine.suspend import Recall
from ovm.process.supervise import race


class Readiness:
    """Gets the guest of one run ready, at the first boot and at each reboot."""

    def __init__(
        self,
        context: Context,
        reports: Reports,
        collaborators: Collaborators,
        *,
        timeout_s: float,
        kernel_was_retried: bool,
    ) -> None:
        self._context = context
        self._reports = reports
        self._collaborators = collaborators
        self._timeout_s = timeout_s
        self._kernel_was_retried = kernel_was_retried
        self.kernel_fell = False
        """Whether the guest's kernel crashed or hung before its first message."""

    async def boot(self, session: Session) -> None:
        """Wait until a booting guest is ready; then start the background work that can wait."""
        try:
            await race(
                self._boot_or_fall(session),
                session.children,
                stage="boot",
                timeout_s=self._timeout_s,
                evidence=session.console_log,
                hint=f"read the guest's console in {session.console_log}",
            )
        except HelperExited as noticed:
            raise await self._collaborators.explain(session, noticed, self._reports.guest_powered_off) from None
        except NotReadyError as late:
            raise self._with_trouble(late) from None
        self._context.add_guest_stages(session)
        if session.profile.engine:
            self._context.in_background(session.settle())

    async def resume(self, session: Session, recall: Recall) -> None:
        """Resume the guest from its saved state.

        Raises:
            Unfit: it could not be resumed; it can boot instead.
        """
        try:
            lost = await race(
                self._resume_or_halt(session, recall), session.children, stage="resume", timeout_s=self._timeout_s
            )
        except (OVMError, BaseExceptionGroup) as error:
            told = first_error(error)
            if not isinstance(told, OVMError):
                raise
            raise Unfit(f"the guest could not resume: {told}") from error
        for port in lost:
            self._context.events.emit("error", port)
        if session.profile.engine:
            self._context.in_background(session.settle())  # the suspend may have cancelled it

    async def _boot_or_fall(self, session: Session) -> None:
        async with asyncio.TaskGroup() as tasks:
            failures = [tasks.create_task(failure) for failure in (self._fall(session), self._halt(session))]
            await self._collaborators.come_up(session, step=self._context.step_done)
            for failure in failures:
                failure.cancel()

    async def _resume_or_halt(self, session: Session, recall: Recall) -> list[PortError]:
        async with asyncio.TaskGroup() as tasks:
            halting = tasks.create_task(self._halt(session))
            lost = await self._collaborators.go_on(session, recall, step=self._context.step_done)
            halting.cancel()
        return lost

    async def _halt(self, session: Session) -> NoReturn:
        """Fail as soon as the hypervisor stops the guest before it is ready: a machine that starts cannot be resumed.

        Raises:
            StartError: always; has the end of the hypervisor's log.
        """
        raise await halt_error(session, *await self._reports.halted.get())

    async def _fall(self, session: Session) -> NoReturn:
        """Fail when the guest resets itself before it is ready: it would reset again and again.

        A kernel that crashes or hangs before the guest's first message is retried once. QEMU 7.2's TCG with two CPUs
        can fail on an instruction that the kernel is patching, and hangs about once in a thousand boots.

        Raises:
            StartError: always; has the end of the guest's console.
        """
        reset, why = self._reports.was_reset, "the guest reset itself before it was ready"
        is_first_boot = self._context.session is None
        if is_first_boot and not self._kernel_was_retried and session.profile.reports_boot:
            try:
                async with asyncio.timeout(self._collaborators.first_word_s):
                    await reset.wait()
            except TimeoutError:
                if not session.channel.stages:
                    reset.set()
                    why = f"the guest's kernel has sent no message for {self._collaborators.first_word_s:g} s"
        await reset.wait()
        self.kernel_fell = not session.channel.stages
        raise await boot_error(session, why)

    def _with_trouble(self, late: NotReadyError) -> NotReadyError:
        """Return ``late`` with the hypervisor's report of a possible cause."""
        if not self._reports.trouble:
            return late
        return NotReadyError(
            f"{late.message}: {self._reports.trouble}", stage=late.stage, log_tail=late.log_tail, hint=late.hint
        )
