"""What has happened to a machine, kept for those who come later."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator

from ovm.errors import OVMError, from_dict
from ovm.model.events import Event, EventKind
from ovm.model.info import Health

KEPT = 1000
"""So many events can be asked for again."""


class History:
    """Every event, numbered; the last ``KEPT`` can be told again."""

    def __init__(self) -> None:
        self._told: deque[Event] = deque(maxlen=KEPT)
        self._ids = itertools.count(1)
        self._more = asyncio.Event()
        self._over = False

    def add(
        self, name: EventKind, *, step: str = "", error: OVMError | None = None, health: Health | None = None
    ) -> None:
        """Write down that this has just happened."""
        # a copy has no traceback, which would keep every frame of it alive for as long as the event is kept
        kept = None if error is None else from_dict(error.as_dict())
        self._told.append(Event(next(self._ids), name, kept, health, step=step))
        self._wake()

    def end(self) -> None:
        """There will be no more; whoever follows is told all that is left."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def follow(self, after: int) -> AsyncIterator[Event]:
        """Everything behind number ``after`` that is still known, then whatever comes, until the end."""
        after = self._ours(after)
        while True:
            more = self._more
            for told in [told for told in self._told if told.id > after]:
                yield told
                after = told.id
            if self._over:
                return
            if more is self._more:  # nothing came while we told
                await more.wait()

    def known(self, after: int) -> list[Event]:
        """Everything behind number ``after`` that is still known."""
        after = self._ours(after)
        return [told for told in self._told if told.id > after]

    def _ours(self, after: int) -> int:
        """A number that was not given yet is one of an earlier service's: then all that is known is new."""
        newest = self._told[-1].id if self._told else 0
        return after if after <= newest else 0
