"""Sleep and wake of the host: a guest that is not paused wakes with a wrong clock, and on macOS may hang.

Sources: IOKit on macOS, logind on Linux, and on both a jump of the clock for sleeps they do not report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

from ovm.power import clock_jump
from ovm.power.clock_jump import Clocks
from ovm.power.filter import Edges

log = logging.getLogger(__name__)

END_S = 5.0
"""Time to wait for the cancelled sources at the end of a watch."""


@contextlib.asynccontextmanager
async def watch(on_sleep: Callable[[], Awaitable[None]], on_wake: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """While inside, call ``on_sleep`` before the host sleeps and ``on_wake`` after it wakes, in this event loop.

    Entering does not wait or raise. Without IOKit, D-Bus or logind, only jumps of the clock are detected, and only
    ``on_wake`` is called. ``filter.py`` documents which edges are reported.

    Args:
        on_sleep: The host sleeps when it returns or fails. After ``macos.SLEEP_LIMIT_S`` or ``linux.SLEEP_LIMIT_S``
            seconds it is cancelled and the host sleeps.
        on_wake: Has no time limit. Also called for a wake without a reported sleep, and for a step of the host's
            clock. The next sleep cancels it, and calls ``on_sleep`` as soon as it has ended.
    """
    clocks = Clocks()
    edges = Edges(on_sleep, on_wake, clocks)
    sources = [
        asyncio.create_task(_keep(lambda: _system(edges))),
        asyncio.create_task(_keep(lambda: clock_jump.watch(clocks, edges.jumped))),
    ]
    try:
        yield
    finally:
        for source in sources:
            source.cancel()
        try:
            await asyncio.wait(sources, timeout=END_S)
        finally:
            await edges.close()


def _system(edges: Edges) -> Awaitable[None]:
    if sys.platform == "darwin":
        from ovm.power import macos

        return macos.watch(edges)
    from ovm.power import linux

    return linux.watch(edges)


async def _keep(source: Callable[[], Awaitable[None]]) -> None:
    """Run a source; log its failure, so that it does not affect the others."""
    try:
        await source()
    except Exception:
        log.exception("a source of the host's sleep and wake failed and is no longer watched")
