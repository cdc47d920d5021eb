"""Limits the size of logs while they are written: the guest's console, helpers, the service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from ovm.process import logs

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Interval between two checks of the sizes. A log may exceed ``logs.SIZE_MAX_BYTES`` by what is written in it."""


@contextlib.asynccontextmanager
async def kept_small(paths: Iterable[Path], *, look_s: float = LOOK_S) -> AsyncIterator[None]:
    """Truncate each of the logs at ``paths`` whenever it is larger than ``logs.SIZE_MAX_BYTES``."""
    watching = asyncio.create_task(_watch(tuple(paths), look_s), name="sizes of logs")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def _watch(paths: tuple[Path, ...], look_s: float) -> None:
    failed: set[Path] = set()
    while True:
        await asyncio.sleep(look_s)
        # not in a thread: a check takes microseconds, but would wake several threads of an idle machine
        if not any(_is_large(path) for path in paths):
            continue
        cutting = asyncio.create_task(asyncio.to_thread(_cut, paths, failed))
        try:
            await asyncio.shield(cutting)
        finally:  # a thread cannot be cancelled, so wait for it
            await asyncio.wait({cutting})


def _is_large(path: Path) -> bool:
    try:
        return path.lstat().st_blocks * 512 > logs.SIZE_MAX_BYTES
    except FileNotFoundError:
        return False
    except OSError:
        return True  # _cut() logs the error


def _cut(paths: tuple[Path, ...], failed: set[Path]) -> None:
    for path in paths:
        try:
            logs.cut(path)
        except OSError as error:
            if path not in failed:
                log.warning("%s cannot be truncated: %s", path, error.strerror or error)
            failed.add(path)
