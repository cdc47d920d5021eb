"""The functions and times that a run uses to boot, watch and shut down a machine; tests pass their own."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from ovm import power
from ovm.errors import HelperExited, PortError, StartError
from ovm.hypervisors import Watcher
from ovm.machine import boot, shutdown
from ovm.machine.prepare import Prepared
from ovm.machine.running import Session
from ovm.machine.suspend import Recall
from ovm.process.child import Child

FIRST_WORD_S = 60.0
"""Time for a guest's first message. Without one the kernel is taken to hang, and the boot is retried once."""
ROOM_AGAIN_S = 5.0
"""How often to check whether the host has room again for a guest that was paused for lack of it."""

REFUSED_LOOK_S = 5.0
"""After a port of a container was refused; by then the guest has listed the container as not started."""


class PowerOn(Protocol):
    """Signature of :func:`ovm.machine.boot.power_on`."""

    def __call__(
        self, prepared: Prepared, *, recall: Recall, step: Callable[[str], None], watcher: Watcher
    ) -> AbstractAsyncContextManager[Session]:
        """Start the helpers and the hypervisor."""


class ComeUp(Protocol):
    """Signature of :func:`ovm.machine.boot.come_up`."""

    async def __call__(self, session: Session, *, step: Callable[[str], None]) -> None:
        """Wait until a booting guest is ready."""


class GoOn(Protocol):
    """Signature of :func:`ovm.machine.boot.go_on`."""

    async def __call__(self, session: Session, recall: Recall, *, step: Callable[[str], None]) -> list[PortError]:
        """Resume a guest from its saved state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collaborators:
    """The functions and times that a run of a machine uses."""

    power_on: PowerOn = boot.power_on
    come_up: ComeUp = boot.come_up
    go_on: GoOn = boot.go_on
    shut_down: Callable[[Session, shutdown.Shutdown], Awaitable[None]] = shutdown.shut_down
    cut_power: Callable[[Session], Awaitable[None]] = shutdown.cut_power
    blame: Callable[[Session, Child], Awaitable[Child]] = boot.blame
    explain: Callable[[Session, HelperExited, Callable[[Child], Awaitable[bool]]], Awaitable[StartError]] = boot.explain
    watch_power: Callable[
        [Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]], AbstractAsyncContextManager[None]
    ] = power.watch
    clock: Callable[[], float] = time.monotonic
    blame_wait_s: float = boot.BLAME_WAIT_S
    first_word_s: float = FIRST_WORD_S
    room_again_s: float = ROOM_AGAIN_S
    refused_look_s: float = REFUSED_LOOK_S
