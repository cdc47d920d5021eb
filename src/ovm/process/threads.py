"""Blocking work in a thread, never left behind."""

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
"""So many items wait at most for who takes them."""
AHEAD_THREAD = "ovm: ahead"
"""What the thread is called that makes them."""


async def in_thread(work: Callable[[], _T], stop: Event | None = None) -> _T:
    """The result of ``work``, done in a thread.

    When cancelled, it sets ``stop`` and is cancelled only once the thread has come to its end.
    """
    # not to_thread: its task would be cancelled with all others when the loop ends, and the thread go on alone
    running = asyncio.get_running_loop().run_in_executor(None, work)
    cancelled = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:  # perhaps more than once: the thread cannot be left alone
            cancelled = error
            if stop is not None:
                stop.set()
    if cancelled is not None:
        running.exception()  # taken note of; being cancelled is what the caller asked for
        raise cancelled
    return running.result()


def ahead(items: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Yield ``items``, which a thread of its own makes while the caller uses those before.

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
                pass  # it may wait to be rid of them
        making.result()
