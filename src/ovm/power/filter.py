"""The filter of edges (sleeps and wakes): which of them reach the callbacks, and how.

- A second sleep in a row is dropped, and so is a second report of the same wake.
- A wake without a sleep is reported: it was a dark wake, or its sleep was not reported, and the clock must be set.
- A jump of the clock counts as a wake. During a reported sleep it may be a dark wake: no source reports those, nor the
  sleep that follows, and a resumed guest would run during that sleep. So the host counts as awake only after it has
  stayed awake for DARK_WAKE_S seconds.
- One callback runs at a time: an edge cancels the last callback, so that a slow wake does not delay a sleep.
- A callback that fails is logged. No failure keeps the host from sleeping.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

from ovm.power.clock_jump import Clocks

log = logging.getLogger(__name__)

DARK_WAKE_S = 60.0
"""Of the time the host is awake: timers stop while it sleeps."""
SAME_WAKE_S = 10.0
"""Wakes within this time are one wake: HasPoweredOn comes seconds after it, and the tick may be first."""
CANCEL_S = 1.0
"""Time to wait for a cancelled callback before the next one is called anyway."""


class Edges:
    """Filters the host's sleeps and wakes, and calls two callbacks in the current event loop."""

    def __init__(
        self, on_sleep: Callable[[], Awaitable[None]], on_wake: Callable[[], Awaitable[None]], clocks: Clocks
    ) -> None:
        self._on_sleep, self._on_wake, self._clocks = on_sleep, on_wake, clocks
        self._asleep = False
        self._woke_at = -math.inf
        self._dark_wake: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    async def sleep(self, limit_s: float) -> None:
        """Report that the host is about to sleep; return when it may, after at most ``limit_s`` seconds."""
        if self._closed:
            return
        if not self._asleep:
            log.info("the host is about to sleep")
            self._asleep = True
            self._call("sleep", self._on_sleep)
        task = self._running
        assert task is not None
        try:
            done, _ = await asyncio.wait({task}, timeout=limit_s)
            if not done:
                log.warning("not ready for the host's sleep within %.1f s; the host sleeps anyway", limit_s)
        finally:
            task.cancel()

    def wake(self) -> None:
        """Report a wake that the system has reported."""
        jumped = self._clocks.jumped()  # consume the jump of this wake, so that the next tick does not report it again
        if self._asleep or jumped or _now() - self._woke_at > SAME_WAKE_S:
            self._wake()

    def stayed_awake(self) -> None:
        """Report that the host does not sleep after all, or that the source of its wake is lost."""
        if self._asleep:
            self.wake()

    def jumped(self) -> None:
        """Report a jump of the clock without a known cause."""
        if not self._asleep:
            self._wake()
        elif not self._closed:
            self._forget_dark_wake()
            self._dark_wake = asyncio.get_running_loop().call_later(DARK_WAKE_S, self._wake)

    async def close(self) -> None:
        """Stop reporting, and end the running callback."""
        self._closed = True
        self._forget_dark_wake()
        if self._running is not None:
            await _cancel(self._running)

    def _wake(self) -> None:
        if self._closed:
            return
        log.info("the host is awake")
        self._asleep, self._woke_at = False, _now()
        self._forget_dark_wake()
        self._call("wake", self._on_wake)

    def _forget_dark_wake(self) -> None:
        if self._dark_wake is not None:
            self._dark_wake.cancel()

    def _call(self, edge: str, callback: Callable[[], Awaitable[None]]) -> None:
        self._running = asyncio.create_task(_after(self._running, edge, callback), name=f"the host's {edge}")


async def _after(last: asyncio.Task[None] | None, edge: str, callback: Callable[[], Awaitable[None]]) -> None:
    if last is not None:
        await _cancel(last)
    try:
        await callback()
    except Exception:
        log.exception("the callback for the host's %s failed", edge)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_S)


def _now() -> float:
    return asyncio.get_running_loop().time()
