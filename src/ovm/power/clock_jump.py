"""Jumps of the wall clock, seen by comparing it with the monotonic clock.

The monotonic clock stops while the host sleeps (``mach_absolute_time``, ``CLOCK_MONOTONIC``), and so does the time
source of the guest's clock. So a change of their difference is the error of the guest's clock, whatever the cause:
a sleep, or a step of the host's clock. A slow tick checks it, for sleeps that no other source reports.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

JUMP_S = 3.0
"""The guest's own chrony corrects smaller jumps."""
TICK_S = 5.0


class Clocks:
    """The two clocks, and their difference at the last check."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._apart = wall() - monotonic()

    def jumped(self) -> bool:
        """Return whether their difference changed by more than JUMP_S seconds since the last call."""
        before, self._apart = self._apart, self._wall() - self._monotonic()
        if abs(self._apart - before) <= JUMP_S:
            return False
        log.info("the host's clock jumped by %.1f s", self._apart - before)
        return True


async def watch(clocks: Clocks, jumped: Callable[[], None], *, tick_s: float = TICK_S) -> None:
    """Call ``jumped`` after each jump; check every ``tick_s`` seconds. Never returns."""
    while True:
        await asyncio.sleep(tick_s)
        if clocks.jumped():
            jumped()
