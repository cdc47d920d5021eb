"""The machine that a service owns, from its creation to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from ovm._version import __version__
from ovm.errors import OVMError, StateError
from ovm.machine.vm import OVM
from ovm.model.defaults import STOP_TIMEOUT_S
from ovm.model.events import EVENT_NAMES, EventName
from ovm.model.info import Health
from ovm.model.states import VMState
from ovm.service.history import History
from ovm.service.protocol import API, Status

log = logging.getLogger(__name__)

Step = Callable[[str], object]


class Host:
    """Creates and starts the machine, records its events, and knows when it is down.

    Args:
        name: Name of the machine.
        make: Creates the machine and reports each step.
        settle: Called whenever the machine is ready, before the ``ready`` event.
        restart_needed: Returns the settings that were changed since the start and need a restart.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Step], Awaitable[OVM]],
        *,
        settle: Callable[[OVM], Awaitable[Sequence[OVMError]]],
        restart_needed: Callable[[], Sequence[str]],
    ) -> None:
        self.name = name
        self.history = History()
        self._make, self._settle, self._restart_needed = make, settle, restart_needed
        self._making: asyncio.Future[OVM] | None = None
        self._machine: OVM | None = None
        self._changing = asyncio.Lock()
        """Held during a reset, so that its stop does not end the service."""
        self._step = ""
        self._started_at = time.time()
        self._fatal: OVMError | None = None
        """The error that ended the machine, until its ``close``."""
        self.died_of: OVMError | None = None
        self.stop_wanted = self.suspend_wanted = False
        self.stop_signal: signal.Signals | None = None
        """The signal that requested the stop, if one did."""

    @property
    def machine(self) -> OVM:
        """The machine.

        Raises:
            StateError: it is still being created.
        """
        if self._machine is None:
            raise StateError(f"{self.name} is being prepared", hint=f"wait until it runs: ovm start {self.name}")
        return self._machine

    async def run(self) -> None:
        """Run the machine until it is down for good. If it failed, :attr:`died_of` has the error."""
        try:
            await self._live()
        except Exception as error:
            log.exception("internal error in the service of %s", self.name)
            self._failed(OVMError(f"the service of {self.name} failed: {type(error).__name__}: {error}"))
        finally:
            self.history.end()

    async def _live(self) -> None:
        self._making = asyncio.ensure_future(self._make(self._tell))
        try:
            machine = self._machine = await self._making
        except asyncio.CancelledError:
            if not self.stop_wanted:
                raise
            self.history.add("close")
            return
        except OVMError as error:
            self._failed(error)
            return
        for name in EVENT_NAMES:
            machine.on(name, self._ready if name == "ready" else partial(self._heard, name))
        if self.stop_wanted:  # the stop came when the creation was just done, too late to cancel it
            self.history.add("close")
            return
        try:
            await machine.start(progress=self._tell)
        except OVMError as error:
            log.info("the start failed: %s", error)  # its listeners have the error event
        except asyncio.CancelledError:
            await machine.stop()
            raise
        while True:
            await machine.wait_closed()
            async with self._changing:
                if machine.state is VMState.STOPPED:
                    return

    async def _ready(self) -> None:
        for error in await self._settle(self.machine):
            self.history.add("error", error=error)
        self._step = ""
        self._heard("ready")

    def _heard(self, name: EventName, what: OVMError | Health | None = None) -> None:
        error = what if isinstance(what, OVMError) else None
        # an error is fatal only if the machine is stopped; it survives others, such as a lost port
        if error is not None and self.machine.state is VMState.STOPPED:
            self._fatal = error
        if name == "close":
            self.died_of, self._fatal = self._fatal, None
        self.history.add(name, error=error, health=what if isinstance(what, Health) else None)

    def _failed(self, error: OVMError) -> None:
        """Record the end by an error that the machine does not report itself."""
        self.died_of = error
        self.history.add("error", error=error)
        self.history.add("close")

    def _tell(self, step: str) -> None:
        self._step = step
        self.history.add("step", step=step)

    def status(self) -> Status:
        """Return the status, in every state."""
        state = VMState.STARTING if self._machine is None else self._machine.state
        up = self._machine is not None and state in {VMState.RUNNING, VMState.PAUSED}
        return Status(
            name=self.name,
            state=state,
            step=self._step,
            health=self.machine.info.health if up else None,
            restart_needed=list(self._restart_needed()),
            started_at=self._started_at,
            pid=os.getpid(),
            version=__version__,
            api=API,
        )

    def logs(self) -> dict[str, Path]:
        """Return the logs of this start, by name."""
        newest = self.machine.options.log_dir.glob("*.log")
        return {path.stem: path for path in sorted(newest) if "." not in path.stem}

    async def stop(self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut the guest down, or cancel its creation; raises as :meth:`OVM.stop` does."""
        self.stop_wanted = True
        if self._machine is not None:
            try:
                await self._machine.stop(force=force, timeout_s=timeout_s, progress=self._tell)
            finally:
                self._step = ""
        elif self._making is not None:
            self._making.cancel()
            await asyncio.wait({self._making})

    async def suspend(self, *, timeout_s: float) -> None:
        """Save the machine's state and stop it; raises as :meth:`OVM.suspend` does."""
        machine, self.suspend_wanted = self.machine, True
        try:
            await machine.suspend(timeout_s=timeout_s)
        except BaseException:
            self.suspend_wanted = False
            raise

    async def reset(self, *, data: bool) -> None:
        """Stop the machine, restore its files and start it again; raises as those calls do."""
        machine = self.machine
        async with self._changing:
            await machine.stop(progress=self._tell)
            await machine.reset_path(data=data)
            await machine.start(progress=self._tell)
