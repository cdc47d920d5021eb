"""Jumps of the wall clock, seen by comparing it with the monotonic clock.

The monotonic clock stops while the host sleeps (``mach_absolute_time``, ``CLOCK_MONOTONIC``), and so does
what the guest's clock runs by. So their difference is by how much the guest became wrong, for whatever reason:
a sleep, or a step of the host's clock. It is looked at by a slow tick: this is what is left when nobody tells.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

JUMP_S = 3.0
"""Less than this is left to the guest's own chrony."""
TICK_S = 5.0


class Clocks:
    """The two clocks, and how far apart they were when last looked at."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._apart = wall() - monotonic()

    def jumped(self) -> bool:
        """Whether they moved by more than JUMP_S seconds against each other since this was last asked."""
        before, self._apart = self._apart, self._wall() - self._monotonic()
        if abs(self._apart - before) <= JUMP_S:
            return False
        log.info("the host's clock jumped by %.1f s", self._apart - before)
        return True


async def watch(clocks: Clocks, jumped: Callable[[], None], *, tick_s: float = TICK_S) -> None:
    """Call ``jumped`` after each jump, for ever; looks every ``tick_s`` seconds."""
    while True:
        await asyncio.sleep(tick_s)
        if clocks.jumped():
            jumped()
