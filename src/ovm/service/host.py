"""The machine that a service holds, from its making to its end."""

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
    """Makes the machine, starts it, writes down what happens to it, and knows when it is over.

    Args:
        name: What the machine is called.
        make: Makes it, telling of its steps.
        settle: Does what is to be done whenever the machine is ready, and before anybody is told.
        restart_needed: Which settings have been changed since.
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
        """Held while it is stopped only to be started again."""
        self._step = ""
        self._started_at = time.time()
        self._fatal: OVMError | None = None
        """What has ended the machine, until its ``close``."""
        self.died_of: OVMError | None = None
        self.stop_wanted = self.suspend_wanted = False
        self.stop_signal: signal.Signals | None = None
        """The one that asked for it, if a signal did."""

    @property
    def machine(self) -> OVM:
        """The machine.

        Raises:
            StateError: it is not there yet.
        """
        if self._machine is None:
            raise StateError(f"{self.name} is being prepared", hint="wait for its ready")
        return self._machine

    async def run(self) -> None:
        """Until the machine is down for good; :attr:`died_of` is what it failed of, if it did."""
        try:
            await self._live()
        except Exception as error:
            log.exception("the service of %s has a flaw", self.name)
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
        if self.stop_wanted:
            self.history.add("close")
            return
        try:
            await machine.start(progress=self._tell)
        except OVMError as error:
            log.info("the start failed: %s", error)  # its listeners have been told
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
        # the machine survives every error that it reports before it is stopped: a port that is lost, for one
        if error is not None and self.machine.state is VMState.STOPPED:
            self._fatal = error
        if name == "close":
            self.died_of, self._fatal = self._fatal, None
        self.history.add(name, error=error, health=what if isinstance(what, Health) else None)

    def _failed(self, error: OVMError) -> None:
        """End with an error that the machine does not report itself."""
        self.died_of = error
        self.history.add("error", error=error)
        self.history.add("close")

    def _tell(self, step: str) -> None:
        self._step = step
        self.history.add("step", step=step)

    def status(self) -> Status:
        """What is the matter, in every state."""
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
        """The logs of this start, by name."""
        newest = self.machine.options.log_dir.glob("*.log")
        return {path.stem: path for path in sorted(newest) if "." not in path.stem}

    async def stop(self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut the guest down, or give up a start; raises as :meth:`OVM.stop` does."""
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
        """Keep the guest's memory, and end; raises as :meth:`OVM.suspend` does."""
        machine, self.suspend_wanted = self.machine, True
        try:
            await machine.suspend(timeout_s=timeout_s)
        except BaseException:
            self.suspend_wanted = False
            raise

    async def reset(self, *, data: bool) -> None:
        """Stop it, restore its files, start it again; raises as those do."""
        machine = self.machine
        async with self._changing:
            await machine.stop(progress=self._tell)
            await machine.reset_path(data=data)
            await machine.start(progress=self._tell)
