"""State shared by the parts of one machine: state, session, monitor, events, and background tasks."""

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

_HINTS = {VMState.STOPPED: "call start() first", VMState.PAUSED: "call vm_resume() first"}


@dataclass(slots=True)
class StopRequest:
    """A stop requested since the last start."""

    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    forced: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to cut the guest's power at once."""
    timeout_s: float | None = None
    """Seconds the guest may take to shut down; ``None`` for the default."""


class Context:
    """State and tasks of one machine, from its creation on. Every part that changes the machine uses it."""

    def __init__(self, prepared: Prepared, events: Events) -> None:
        self.prepared = prepared
        self.events = events
        self.state = VMState.STOPPED
        self.session: Session | None = None
        self.monitor: Monitor | None = None
        self.stages: list[Stage] = []
        self.not_resumed = ""
        """Why the last start booted the guest instead of resuming it."""
        self.stop = StopRequest()
        self.progress: list[Progress] = []
        """Callbacks for each step of the current start or stop."""
        self._began = 0.0
        self._background: set[asyncio.Task[None]] = set()
        self._changes: set[asyncio.Task[None]] = set()

    # -- the state

    def to(self, state: VMState) -> None:
        """Change the state; no other code does.

        Raises:
            StateError: ``state`` may not follow the current state.
        """
        if not may_follow(self.state, state):
            raise StateError(
                f"the machine is {self.spoken()} and cannot become {_spoken(state)}",
                hint="call stop(), then start()",
            )
        log.debug("%s → %s", self.state, state)
        self.state = state

    def spoken(self) -> str:
        """Return the state's name for messages."""
        return _spoken(self.state)

    def is_running(self) -> bool:
        """Return whether the guest is ready and running."""
        return self.state is VMState.RUNNING

    def require(self, states: Collection[VMState], call: str) -> Session:
        """Return the session if the machine is in one of ``states``.

        Raises:
            StateError: the state is another one; names ``call``.
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
            raise UnsupportedError(f"{call}: a bare guest has no sshd")
        return session

    def refuse(self, call: str) -> NoReturn:
        """Refuse ``call`` in the current state.

        Raises:
            StateError: always.
        """
        raise StateError(
            f"{call}: the machine is {self.spoken()}", hint=_HINTS.get(self.state, "wait until it is ready")
        )

    # -- the progress of a start or stop

    def begin_boot(self) -> None:
        """Forget the stages of an earlier boot, and measure stages from now on."""
        self._began, self.stages = time.monotonic(), []

    def step_done(self, stage: str) -> None:
        """Record a completed stage of the start, and report it."""
        self.stages.append(Stage(stage, (time.monotonic() - self._began) * 1000))
        self.report_progress(stage)

    def add_guest_stages(self, session: Session) -> None:
        """Add the stages that the guest reported, in order of time."""
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
        """Start the background tasks of a running machine."""
        if session.profile.engine:
            self.in_background(session.keep_attached())
        if self.monitor is not None:
            self.in_background(self.monitor.keep_looking())

    async def run_to_end(self, change: Coroutine[Any, Any, None]) -> None:
        """Run a change of the state to its end, even if the caller is cancelled."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._report_failure)  # the cancelled caller cannot get the error
            raise

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` in a task until the session ends. A failure is logged and emitted as an ``error`` event."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(self._report_failure)

    def end_background(self) -> None:
        """Cancel the background tasks."""
        for task in self._background:
            task.cancel()

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        error = log_failure(task)
        # neither a requested stop nor an error of a cancelled task is a failure
        if error is not None and not self.stop.wanted.is_set() and not task.cancelling():
            self.events.emit("error", as_ovm_error(error))


def log_failure(task: asyncio.Task[Any]) -> BaseException | None:
    """Log and return the error of a task that nothing awaits."""
    if task.cancelled() or (error := task.exception()) is None:
        return None
    log.error("a background task failed", exc_info=error)
    return error


def as_ovm_error(error: BaseException) -> OVMError:
    """Return ``error`` as an OVMError, for listeners."""
    return error if isinstance(error, OVMError) else OVMError(f"internal error: {error!r}")


async def overtake(tasks: Iterable[asyncio.Task[None] | None]) -> None:
    """Cancel tasks that another one replaces, and wait until they have ended."""
    overtaken = {task for task in tasks if task is not None}
    for task in overtaken:
        task.cancel()
    if overtaken:
        await asyncio.wait(overtaken)
    for task in overtaken:
        log_failure(task)


def _spoken(state: VMState) -> str:
    return state.removeprefix("VirtualMachineState").lower()
