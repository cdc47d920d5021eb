"""Blocking work in a thread, never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Event
from typing import TypeVar

_T = TypeVar("_T")


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
