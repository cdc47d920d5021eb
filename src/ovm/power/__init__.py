"""Sleep and wake of the host: a guest that nobody pauses wakes with a wrong clock, and on macOS may hang.

Who tells of them: IOKit on macOS, logind on Linux, and on both a jump of the clock for what they leave out.
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
"""How long the end of a watch waits for what it has cancelled."""


@contextlib.asynccontextmanager
async def watch(on_sleep: Callable[[], Awaitable[None]], on_wake: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """While inside, call ``on_sleep`` before the host sleeps and ``on_wake`` after it woke, in this event loop.

    Entering waits for nothing, raises nothing, and needs neither IOKit nor D-Bus nor logind: where they are missing,
    only jumps of the clock are left, and with them ``on_wake``. Which edges are passed on is told in ``edges.py``.

    Args:
        on_sleep: The host sleeps when it returns or fails, at the latest after ``macos.SLEEP_LIMIT_S`` or
            ``linux.SLEEP_LIMIT_S`` seconds, and then cancels it.
        on_wake: May take its time. Also called for a wake that no sleep was told before, and for a step of the
            host's clock. Cancelled by the next sleep, which calls ``on_sleep`` as soon as it has ended.
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
    """A source that fails takes nothing with it."""
    try:
        await source()
    except Exception:
        log.exception("the host's sleep and wake are not watched any more in this way")
