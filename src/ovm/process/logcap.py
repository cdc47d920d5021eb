"""Keeps logs small while they are written, whoever writes them: the guest's console, helpers, the service."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from ovm.process import logs
from ovm.process.threads import in_thread

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the sizes. What is written in it comes on top of ``logs.SIZE_MAX_BYTES``."""


@contextlib.asynccontextmanager
async def kept_small(paths: Iterable[Path], *, look_s: float = LOOK_S) -> AsyncIterator[None]:
    """Cut each of the logs at ``paths`` whenever it is larger than ``logs.SIZE_MAX_BYTES``.

    It has a thread of its own. Each look from the event loop would wake the loop twice and several threads of its
    pool, which an idle machine must not do.
    """
    over = threading.Event()
    watching = threading.Thread(target=_watch, args=(tuple(paths), look_s, over), name="sizes of logs", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        await in_thread(watching.join)  # it may be cutting one of them


def _watch(paths: tuple[Path, ...], look_s: float, over: threading.Event) -> None:
    failed: set[Path] = set()
    while not over.wait(look_s):
        _cut(paths, failed)


def _cut(paths: tuple[Path, ...], failed: set[Path]) -> None:
    for path in paths:
        try:
            logs.cut(path)
        except OSError as error:
            if path not in failed:
                log.warning("%s cannot be kept small: %s", path, error.strerror or error)
            failed.add(path)
