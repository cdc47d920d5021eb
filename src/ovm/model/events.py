"""What a machine tells while it lives: the seed's five events and one more, each listener with a queue of its own.

========== ============================================================
name       when
========== ============================================================
ready      the engine answers; after every start, and after a reboot
close      the machine is down; exactly once for every start
vmPause    the virtual CPUs are paused
vmResume   they run again and the guest's clock is right
error      something went wrong; ``Event.error`` says what
health     it is no longer well, or well again; ``Event.health`` says how
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
    import asyncio  # a client that waits has no event loop, and need not import one

log = logging.getLogger(__name__)

EventName = Literal["ready", "close", "vmPause", "vmResume", "error", "health"]
EVENT_NAMES: tuple[EventName, ...] = get_args(EventName)
EventKind = Literal[EventName, "step"]
"""What an event in a service's history can be."""

Listener = Callable[..., object] | Callable[..., Awaitable[object]]
"""Called with nothing, for ``error`` with the exception, for ``health`` with it; may be a coroutine function."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that happened to a machine."""

    id: int
    """Counts from 1 over the life of the object, without gaps; a service counts its steps, too."""
    name: EventKind
    """``step`` only in a service's history."""
    error: OVMError | None = None
    """What went wrong; only with ``error``."""
    health: Health | None = None
    """How it is; only with ``health``."""
    at: float = msgspec.field(default_factory=time.time)
    """When, in seconds since the epoch on the host's clock."""
    step: str = ""
    """What a start or a stop has just done; only with ``step``."""


class _Stream:
    """One iterator over the events; forgotten when nobody holds it any more."""

    def __init__(self) -> None:
        import asyncio

        self.queue: asyncio.Queue[Event] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        return await self.queue.get()


class Events:
    """Hands each event to every listener and every open iterator, in the order they happened."""

    def __init__(self) -> None:
        self._count = 0
        self._listeners: dict[EventName, dict[object, Listener]] = {name: {} for name in EVENT_NAMES}
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._running: set[asyncio.Future[object]] = set()

    def on(self, name: EventName, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` at each event called ``name``; returns what removes it again.

        Raises:
            OptionError: there is no event of that name.
        """
        if name not in self._listeners:
            raise OptionError(f"there is no event {name!r}", hint=f"the events are {', '.join(EVENT_NAMES)}")
        listeners, token = self._listeners[name], object()
        listeners[token] = listener

        def remove() -> None:
            listeners.pop(token, None)

        return remove

    def stream(self) -> AsyncIterator[Event]:
        """Every event from this call on, each iterator with its own queue.

        Listening begins with the call itself, not with the first ``anext``.
        """
        stream = _Stream()
        self._streams.add(stream)
        return stream

    def emit(self, name: EventName, error: OVMError | None = None, *, health: Health | None = None) -> None:
        """Tell everybody. A listener that fails is logged and hurts nobody else."""
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
            log.exception("the listener for %s failed", event.name)
            return
        if inspect.isawaitable(result):
            import asyncio

            future = asyncio.ensure_future(result)
            self._running.add(future)
            future.add_done_callback(self._finished)

    def _finished(self, future: asyncio.Future[object]) -> None:
        self._running.discard(future)
        if not future.cancelled() and (error := future.exception()):
            log.error("an asynchronous listener failed", exc_info=error)
