"""Blocking work in a thread that never outlives its caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import Queue
from threading import Event
from typing import TypeVar

_T = TypeVar("_T")

AHEAD = 4
"""Limit of items in the queue."""
AHEAD_THREAD = "ovm: ahead"
"""Name of the read-ahead thread."""


async def in_thread(work: Callable[[], _T], stop: Event | None = None) -> _T:
    """Run ``work`` in a thread and return its result.

    When cancelled, set ``stop`` and wait until the thread has ended before raising.
    """
    # not to_thread: the end of the loop would cancel its task with all others, and leave the thread running
    running = asyncio.get_running_loop().run_in_executor(None, work)
    cancelled = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:  # may happen again: always wait for the thread
            cancelled = error
            if stop is not None:
                stop.set()
    if cancelled is not None:
        running.exception()  # retrieved, so that asyncio does not log it
        raise cancelled
    return running.result()


def ahead(items: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Yield ``items``, produced by a thread that reads ahead.

    Close the generator: that ends the thread.
    """
    made: Queue[_T | None] = Queue(AHEAD)
    wanted = True

    def make() -> None:
        try:
            with closing(items):
                for item in items:
                    made.put(item)
                    if not wanted:
                        return
        finally:
            made.put(None)

    with ThreadPoolExecutor(1, AHEAD_THREAD) as thread:
        making = thread.submit(make)
        taken = iter(made.get, None)
        try:
            yield from taken
        finally:
            wanted = False
            for _ in taken:
                pass  # drain the queue: the thread may block on it when full
        making.result()
