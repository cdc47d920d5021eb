"""Waits that cannot hang: each has a timeout and ends when a process it depends on exits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ovm.errors import NotReadyError
from ovm.process import logs
from ovm.process.child import Child

T = TypeVar("T")


async def first_exit(children: Iterable[Child]) -> Child:
    """Wait for the first of ``children`` to end and return it."""
    waits = {asyncio.ensure_future(child.wait()): child for child in children}
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        return waits[next(iter(done))]
    finally:
        await _cancel(waits)


async def race(
    what: Awaitable[T],
    children: Iterable[Child],
    *,
    stage: str,
    timeout_s: float,
    evidence: Path | None = None,
    hint: str = "",
) -> T:
    """Return the result of ``what``, unless one of ``children`` ends first or ``timeout_s`` seconds pass.

    Raises:
        HelperExited: a child ended first.
        NotReadyError: the timeout passed; shows the last lines of ``evidence``.
    """
    wanted = asyncio.ensure_future(what)
    death = asyncio.ensure_future(first_exit(children))
    try:
        racers: set[asyncio.Future[Any]] = {wanted, death}
        done, _ = await asyncio.wait(racers, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if wanted in done:
            return wanted.result()
        if death in done:
            raise await death.result().exited(stage)
        raise NotReadyError(
            f"not ready within {timeout_s:g} s",
            stage=stage,
            log_tail=await asyncio.to_thread(logs.tail, evidence) if evidence else (),
            hint=hint,
        )
    finally:
        await _cancel([wanted, death])


async def _cancel(futures: Iterable[asyncio.Future[Any]]) -> None:
    futures = tuple(futures)
    pending = [future for future in futures if not future.done()]
    for future in pending:
        future.cancel()
    if pending:
        await asyncio.wait(pending)  # awaiting each would mistake our own cancellation for theirs
    for future in futures:
        if not future.cancelled():
            future.exception()  # retrieved, so that asyncio does not log it
