"""Keeps logs small while they are written, whoever writes them: the guest's console, helpers, the service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from ovm.process import logs

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the sizes. What is written in it comes on top of ``logs.SIZE_MAX_BYTES``."""


@contextlib.asynccontextmanager
async def kept_small(paths: Iterable[Path], *, look_s: float = LOOK_S) -> AsyncIterator[None]:
    """Cut each of the logs at ``paths`` whenever it is larger than ``logs.SIZE_MAX_BYTES``."""
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
        # not in a thread: each of these looks, which take microseconds, would wake several threads of an idle machine
        if not any(_is_large(path) for path in paths):
            continue
        cutting = asyncio.create_task(asyncio.to_thread(_cut, paths, failed))
        try:
            await asyncio.shield(cutting)
        finally:  # a thread cannot be cancelled, so it is waited for
            await asyncio.wait({cutting})


def _is_large(path: Path) -> bool:
    try:
        return path.lstat().st_blocks * 512 > logs.SIZE_MAX_BYTES
    except FileNotFoundError:
        return False
    except OSError:
        return True  # what cannot be looked at is told by the cut


def _cut(paths: tuple[Path, ...], failed: set[Path]) -> None:
    for path in paths:
        try:
            logs.cut(path)
        except OSError as error:
            if path not in failed:
                log.warning("%s cannot be kept small: %s", path, error.strerror or error)
            failed.add(path)
