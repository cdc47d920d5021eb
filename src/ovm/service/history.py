"""The past events of a machine."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator

from ovm.errors import OVMError, from_dict
from ovm.model.events import Event, EventKind
from ovm.model.info import Health

KEPT = 1000
"""Number of past events that clients can query."""


class History:
    """Numbers every event and keeps the last ``KEPT``."""

    def __init__(self) -> None:
        self._told: deque[Event] = deque(maxlen=KEPT)
        self._ids = itertools.count(1)
        self._more = asyncio.Event()
        self._over = False

    def add(
        self, name: EventKind, *, step: str = "", error: OVMError | None = None, health: Health | None = None
    ) -> None:
        """Add an event that has just happened."""
        # a copy has no traceback, which would keep every frame of it alive for as long as the event is kept
        kept = None if error is None else from_dict(error.as_dict())
        self._told.append(Event(next(self._ids), name, kept, health, step=step))
        self._wake()

    def end(self) -> None:
        """End the events; followers still receive the rest."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def follow(self, after: int) -> AsyncIterator[Event]:
        """Yield the kept events after number ``after``, then new ones until the end."""
        after = self._ours(after)
        while True:
            more = self._more
            for told in [told for told in self._told if told.id > after]:
                yield told
                after = told.id
            if self._over:
                return
            if more is self._more:  # else an event came while we yielded: do not wait, look again
                await more.wait()

    def known(self, after: int) -> list[Event]:
        """Return the kept events after number ``after``."""
        after = self._ours(after)
        return [told for told in self._told if told.id > after]

    def _ours(self, after: int) -> int:
        """Return ``after``, or 0 if this service has not reached that number: it comes from an earlier service."""
        newest = self._told[-1].id if self._told else 0
        return after if after <= newest else 0
