"""What the parts of one machine share: its state, session, monitor and events, and the tasks that run beside it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ovm.errors import OVMError, StateError, UnsupportedError
from ovm.machine.monitor import Monitor
from ovm.machine.prepare import Prepared
from ovm.machine.running import Session
from ovm.model.events import Events
from ovm.model.info import Stage
from ovm.model.states import VMState, may_follow

log = logging.getLogger(__name__)

Progress = Callable[[str], object]

_HINTS = {VMState.STOPPED: "start() it first", VMState.PAUSED: "vm_resume() it first"}


@dataclass(slots=True)
class StopRequest:
    """Whether a stop was requested since the last start, and how."""

    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    forced: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the guest's power is to be cut at once."""
    timeout_s: float | None = None
    """Seconds the guest may take to shut down; ``None`` for the default."""


class Context:
    """State and tasks of one machine, from its creation on. All that changes the machine takes it."""

    def __init__(self, prepared: Prepared, events: Events) -> None:
        self.prepared = prepared
        self.events = events
        self.state = VMState.STOPPED
        self.session: Session | None = None
        self.monitor: Monitor | None = None
        self.stages: list[Stage] = []
        self.not_resumed = ""
        """Why the last start booted the guest although it was to resume it."""
        self.stop = StopRequest()
        self.progress: list[Progress] = []
        """Callbacks that get each step of the start or stop that is under way."""
        self._began = 0.0
        self._background: set[asyncio.Task[None]] = set()
        self._changes: set[asyncio.Task[None]] = set()

    # -- the state

    def to(self, state: VMState) -> None:
        """Change the state; nothing else does.

        Raises:
            StateError: ``state`` may not follow the present one.
        """
        if not may_follow(self.state, state):
            raise StateError(
                f"the machine is {self.spoken()} and cannot become {_spoken(state)}",
                hint="stop() it, then start() it again",
            )
        log.debug("%s → %s", self.state, state)
        self.state = state

    def spoken(self) -> str:
        """Return the state in a word for people."""
        return _spoken(self.state)

    def is_running(self) -> bool:
        """Return whether the guest runs and is ready."""
        return self.state is VMState.RUNNING

    def require(self, states: Collection[VMState], call: str) -> Session:
        """Return the session if the machine is in one of ``states``.

        Raises:
            StateError: it is not, so ``call`` is refused.
        """
        if self.session is None or self.state not in states:
            self.refuse(call)
        return self.session

    def require_running(self, call: str) -> Session:
        """Return the session if the machine runs; raises StateError."""
        return self.require({VMState.RUNNING}, call)

    def require_managed(self, call: str) -> Session:
        """Return the session if the machine runs and its guest has an sshd; raises StateError, UnsupportedError."""
        session = self.require_running(call)
        if not session.profile.engine:
            raise UnsupportedError(f"{call}: the guest is bare, nothing in it could do that")
        return session

    def refuse(self, call: str) -> NoReturn:
        """Report that ``call`` does not fit the present state.

        Raises:
            StateError: always.
        """
        raise StateError(f"{call}: the machine is {self.spoken()}", hint=_HINTS.get(self.state, "wait for its ready"))

    # -- the progress of a start or stop

    def begin_boot(self) -> None:
        """Forget the stages of an earlier boot and measure those of this one from now on."""
        self._began, self.stages = time.monotonic(), []

    def step_done(self, stage: str) -> None:
        """Record a stage of the start and report it."""
        self.stages.append(Stage(stage, (time.monotonic() - self._began) * 1000))
        self.report_progress(stage)

    def add_guest_stages(self, session: Session) -> None:
        """Sort what the guest has reported of its boot in between the host's stages."""
        heard = (
            Stage(
                f"guest: {s.name}",
                (s.heard_at - self._began) * 1000,
                None if s.uptime_s is None else s.uptime_s * 1000,
            )
            for s in session.channel.stages
        )
        self.stages = sorted([*self.stages, *heard], key=lambda stage: stage.ms)

    def report_progress(self, step: str) -> None:
        """Call every progress callback."""
        for listener in self.progress:
            try:
                listener(step)
            except Exception:
                log.exception("a progress callback raised")

    # -- tasks

    def look_after(self, session: Session) -> None:
        """Begin what is done for a machine all the time that it runs."""
        if session.profile.engine:
            self.in_background(session.keep_attached())
        if self.monitor is not None:
            self.in_background(self.monitor.keep_looking())

    async def run_to_end(self, change: Coroutine[Any, Any, None]) -> None:
        """Make a change of the state that is finished once begun, even if the caller is cancelled."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._report_failure)  # the caller is gone and cannot get the error any more
            raise

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` beside, for as long as the session lasts. Its failure is logged and is an ``error`` event."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(self._report_failure)

    def end_background(self) -> None:
        """Cancel what is done beside."""
        for task in self._background:
            task.cancel()

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        error = log_failure(task)
        # a stop that was asked for is no failure, nor is what a task raises because it was cancelled
        if error is not None and not self.stop.wanted.is_set() and not task.cancelling():
            self.events.emit("error", as_ovm_error(error))


def log_failure(task: asyncio.Task[Any]) -> BaseException | None:
    """Log what a task raised that nothing waits for any more, and return it."""
    if task.cancelled() or (error := task.exception()) is None:
        return None
    log.error("a background task failed", exc_info=error)
    return error


def as_ovm_error(error: BaseException) -> OVMError:
    """Return an error that listeners can get, whatever was raised."""
    return error if isinstance(error, OVMError) else OVMError(f"internal error: {error!r}")


async def overtake(tasks: Iterable[asyncio.Task[None] | None]) -> None:
    """Cancel tasks that something else replaces, and wait until they have ended."""
    overtaken = {task for task in tasks if task is not None}
    for task in overtaken:
        task.cancel()
    if overtaken:
        await asyncio.wait(overtaken)
    for task in overtaken:
        log_failure(task)


def _spoken(state: VMState) -> str:
    return state.removeprefix("VirtualMachineState").lower()
