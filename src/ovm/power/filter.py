"""Which of the edges that are told are passed on, and how.

- A sleep after a sleep is not passed on again, nor is a wake that two sources tell.
- A wake without a sleep is passed on: it was a dark wake, or its sleep came unannounced, and the clock is to be set.
- A jump of the clock is a wake. But during a sleep that was told, it is a dark wake at first: that is not told, the
  host goes back to sleep without a word, and a guest that was resumed would run into it. Only a host that then stays
  awake for DARK_WAKE_S seconds is taken for awake.
- One callback runs at a time: an edge cancels what the last one still does, so no slow wake keeps a sleep waiting.
- A callback that fails is logged. Nothing keeps the host from sleeping.
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
"""HasPoweredOn comes seconds after the wake, when the tick may have seen it already."""
CANCEL_S = 1.0
"""How long a cancelled callback may take to end before the next one is called all the same."""


class Edges:
    """What happened to the host, passed on to two callbacks. Belongs to the event loop it is used in."""

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
        """The host is about to sleep; returns when it may, after ``limit_s`` seconds at the latest."""
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
                log.warning("not ready for the host's sleep within %.1f s, so it sleeps all the same", limit_s)
        finally:
            task.cancel()

    def wake(self) -> None:
        """The host woke, as the system tells."""
        jumped = self._clocks.jumped()  # which is this wake's, and not to be found by the next tick
        if self._asleep or jumped or _now() - self._woke_at > SAME_WAKE_S:
            self._wake()

    def stayed_awake(self) -> None:
        """The host will not sleep after all, or nobody is left to tell of its wake."""
        if self._asleep:
            self.wake()

    def jumped(self) -> None:
        """The clock jumped, and nobody has told why."""
        if not self._asleep:
            self._wake()
        elif not self._closed:
            self._forget_dark_wake()
            self._dark_wake = asyncio.get_running_loop().call_later(DARK_WAKE_S, self._wake)

    async def close(self) -> None:
        """Pass nothing on any more; ends the callback that runs."""
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
        log.exception("what was to be done at the host's %s failed", edge)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_S)


def _now() -> float:
    return asyncio.get_running_loop().time()
