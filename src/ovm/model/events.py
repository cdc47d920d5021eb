"""Events of a machine: the seed's five and ``health``.

========== ============================================================
name       when
========== ============================================================
ready      podman answers; after every start, and after a reboot
close      the machine is stopped; exactly once for every start
vmPause    the virtual CPUs are paused
vmResume   the virtual CPUs run again, after an attempt to set the clock
error      something failed; ``Event.error`` is the exception
health     the health problems changed; ``Event.health`` lists them
========== ============================================================
"""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from ovm.errors import OptionError, OVMError
from ovm.model.info import Health

if TYPE_CHECKING:
    import asyncio  # the blocking client has no event loop and need not import asyncio

log = logging.getLogger(__name__)

EventName = Literal["ready", "close", "vmPause", "vmResume", "error", "health"]
EVENT_NAMES: tuple[EventName, ...] = get_args(EventName)
EventKind = Literal[EventName, "step"]
"""Kinds of events in a service's history."""

Listener = Callable[..., object] | Callable[..., Awaitable[object]]
"""Called with the exception for ``error``, with the ``Health`` for ``health``, else with nothing; may be async."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event of a machine."""

    id: int
    """Number of the event, from 1 over the life of the object, without gaps; a service counts its steps too."""
    name: EventKind
    """``step`` only in a service's history."""
    error: OVMError | None = None
    """The exception; only with ``error``."""
    health: Health | None = None
    """The health; only with ``health``."""
    at: float = msgspec.field(default_factory=time.time)
    """Time, in seconds since the epoch on the host's clock."""
    step: str = ""
    """The completed step of a start or stop; only with ``step``."""


class _Stream:
    """One iterator over the events; dropped when no reference to it is left."""

    def __init__(self) -> None:
        import asyncio

        self.queue: asyncio.Queue[Event] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        return await self.queue.get()


class Events:
    """Delivers each event to every listener and every open iterator, in order."""

    def __init__(self) -> None:
        self._count = 0
        self._listeners: dict[EventName, dict[object, Listener]] = {name: {} for name in EVENT_NAMES}
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._running: set[asyncio.Future[object]] = set()

    def on(self, name: EventName, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` at each event called ``name``; return a function that removes it.

        Raises:
            OptionError: the event name is unknown.
        """
        if name not in self._listeners:
            raise OptionError(f"there is no event {name!r}", hint=f"use one of {', '.join(EVENT_NAMES)}")
        listeners, token = self._listeners[name], object()
        listeners[token] = listener

        def remove() -> None:
            listeners.pop(token, None)

        return remove

    def stream(self) -> AsyncIterator[Event]:
        """Return an iterator over every event from this call on; each iterator has its own queue.

        The iterator collects events from the call itself, not from the first ``anext``.
        """
        stream = _Stream()
        self._streams.add(stream)
        return stream

    def emit(self, name: EventName, error: OVMError | None = None, *, health: Health | None = None) -> None:
        """Deliver an event. A listener that fails is logged and does not affect the others."""
        self._count += 1
        event = Event(self._count, name, error, health)
        for stream in self._streams:
            stream.queue.put_nowait(event)
        for listener in tuple(self._listeners[name].values()):
            self._call(listener, event)

    def _call(self, listener: Listener, event: Event) -> None:
        try:
            result = listener(*(told for told in (event.error, event.health) if told is not None))
        except Exception:
            log.exception("an event listener for %s raised", event.name)
            return
        if inspect.isawaitable(result):
            import asyncio

            future = asyncio.ensure_future(result)
            self._running.add(future)
            future.add_done_callback(self._finished)

    def _finished(self, future: asyncio.Future[object]) -> None:
        self._running.discard(future)
        if not future.cancelled() and (error := future.exception()):
            log.error("an asynchronous event listener raised", exc_info=error)
