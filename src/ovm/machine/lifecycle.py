"""The life of a machine: one task runs it from the start to its ``close``, and decides about restarts."""

from __future__ import annotations

import asyncio
import logging

from ovm.disks.saved_state import is_there
from ovm.errors import StateError, StopError
from ovm.machine.collaborators import Collaborators
from ovm.machine.context import Context, Progress, StopRequest, as_ovm_error
from ovm.machine.outcome import Ending, History, NextStep, Outcome, next_step
from ovm.machine.pause import PauseControl
from ovm.machine.run import Run
from ovm.model.states import VMState
from ovm.paths import TargetPaths

log = logging.getLogger(__name__)


class Lifecycle:
    """Starts and stops one machine, any number of times."""

    def __init__(self, context: Context, pause: PauseControl, collaborators: Collaborators) -> None:
        self.collaborators = collaborators
        self._context = context
        self._pause = pause
        self._keeper: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of the last start."""
        return self._keeper is None or self._keeper.done()

    async def start(self, *, resume: bool, timeout_s: float, progress: Progress | None) -> None:
        """Start the machine, as :meth:`ovm.OVM.start` documents."""
        if not self.is_over:
            raise StateError(f"the machine is already {self._context.spoken()}", hint="call stop() first")
        self._context.stop = StopRequest()
        self._context.progress = [] if progress is None else [progress]
        self._context.not_resumed = ""
        directory = self._context.prepared.options.target_dir
        # in this thread, although it looks at the disk: an await here would let a second start in
        restoring = resume and is_there(TargetPaths(directory))
        self._begin(VMState.RESTORING if restoring else VMState.STARTING)
        started = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(
            self._keep(started, resume=resume, timeout_s=timeout_s), name=f"life of {directory}"
        )
        try:
            await asyncio.shield(started)
        except asyncio.CancelledError:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})  # otherwise helpers could outlive the cancelled call
            raise

    async def stop(self, *, force: bool, timeout_s: float, progress: Progress | None) -> None:
        """Stop the machine, as :meth:`ovm.OVM.stop` documents."""
        keeper = self._keeper
        if keeper is None or keeper.done():
            return
        stop = self._context.stop
        first = not stop.wanted.is_set()
        if first:
            stop.timeout_s = timeout_s
            self._context.progress = []
        if progress is not None:
            self._context.progress.append(progress)
        stop.wanted.set()
        if force:
            stop.forced.set()
        if first:
            # in the next turn of the loop: a task cancelled before its first step would never settle the start's future
            asyncio.get_running_loop().call_soon(self._cancel_start, keeper)
        await self.wait_ended("the machine could not be stopped cleanly")

    def _cancel_start(self, keeper: asyncio.Task[None]) -> None:
        if self._context.session is None:
            keeper.cancel()

    async def wait_closed(self) -> None:
        """Wait until the machine is closed, as :meth:`ovm.OVM.wait_closed` documents."""
        if self._keeper is not None:
            await asyncio.wait({self._keeper})

    async def wait_ended(self, failure: str) -> None:
        """Wait until the run has ended.

        Raises:
            StopError: with the message ``failure``: a helper could not be ended.
        """
        keeper = self._keeper
        assert keeper is not None
        await asyncio.wait({keeper})
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            raise StopError(failure) from error

    def _begin(self, state: VMState = VMState.STARTING) -> None:
        """Leave Stopped, and reset what an earlier run recorded."""
        self._context.begin_boot()
        self._pause.begin()
        self._context.to(state)

    async def _keep(self, started: asyncio.Future[None], *, resume: bool, timeout_s: float) -> None:
        """Run the machine, and run it again while :func:`next_step` decides so."""
        history = History(may_restart=self._context.prepared.options.network_loss == "restart")
        while True:
            outcome = await Run(
                self._context,
                self._pause,
                self.collaborators,
                ready=started,
                timeout_s=timeout_s,
                resume=resume,
                kernel_was_retried=history.kernel_was_retried,
            ).outcome()
            resume = False  # no later run may resume the state that is saved now
            step = next_step(outcome, history)
            history = history.after(step, outcome.at)
            match step:
                case NextStep.END:
                    return self._close(outcome, started)
                case NextStep.RETRY_KERNEL:
                    log.warning(
                        "the guest's kernel crashed before its first boot message; starting it again: %s", outcome.error
                    )
                case NextStep.BOOT_INSTEAD:
                    self._context.not_resumed = str(outcome.error)
                case NextStep.RESTART:
                    self._close(outcome, started)
                    log.warning("restarting the machine: the network was lost")
                    started = asyncio.get_running_loop().create_future()
            self._begin()

    def _close(self, outcome: Outcome, started: asyncio.Future[None]) -> None:
        """Report the outcome to listeners and to start()'s caller; raise the error of a requested stop."""
        error, stopped = outcome.error, outcome.ending is Ending.STOPPED
        if error is not None and not stopped:
            self._context.events.emit("error", as_ovm_error(error))
        self._context.events.emit("close")
        if started.done():
            if error is not None and stopped:
                raise error  # to stop()'s caller
        elif error is None:
            started.cancel()
        else:
            started.set_exception(error)
            started.exception()  # mark as retrieved: a cancelled start() never awaits it
