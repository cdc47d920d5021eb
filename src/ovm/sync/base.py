"""The parts of the blocking machines that cannot be generated from the asynchronous ones."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from ovm.machine.vm import OVM
from ovm.model.events import Event, EventName, Listener
from ovm.model.options import Options
from ovm.service.remote import RemoteOVM
from ovm.sync.loop import Loop, Stream
from ovm.sync.process import Process


class _Tells(Protocol):
    def on(self, name: EventName, listener: Listener) -> Callable[[], None]: ...

    def events(self) -> AsyncIterator[Event]: ...


M = TypeVar("M", bound=_Tells)


class Twin(Generic[M]):
    """A machine whose calls block until they are done."""

    def __init__(self, loop: Loop, machine: M) -> None:
        self._loop = loop
        self._async = machine

    def __repr__(self) -> str:
        return repr(self._async)

    def on(self, name: EventName, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` at each event of that name; returns a function that removes it.

        ``ready``, ``close``, ``vmPause`` and ``vmResume`` pass nothing, ``error`` passes the exception, ``health`` an
        :class:`ovm.Health`. Listeners are called one after the other in their own thread, where they may call the
        machine.

        Raises:
            OptionError: the event is unknown.
        """
        remove = self._loop.call(self._async.on, name, self._loop.elsewhere(listener))
        return lambda: self._loop.call(remove)

    def events(self) -> Iterator[Event]:
        """Iterate over the events from this call on, in order; each iterator has its own queue. ``next`` blocks."""
        return Stream(self._loop, self._loop.call(self._async.events))


class Local(Twin[OVM]):
    """A virtual machine that runs Podman, created by :func:`ovm.sync.create_linux_ovm` or :func:`ovm.sync.create_ovm`.

    ``with machine:`` starts and stops it. One object can be started and stopped any number of times, from any thread.
    If the interpreter exits while the machine runs, the guest is shut down first.
    """

    @property
    def options(self) -> Options:
        """The options of the machine."""
        return self._async.options

    def __enter__(self) -> Self:
        try:
            self._loop.run(self._async.start)
        except KeyboardInterrupt:  # it may come when the start was just done
            self._loop.run(self._async.stop, force=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self._async.stop)

    @contextlib.contextmanager
    def process(self, argv: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Iterator[Process]:
        """Run a command as root in the guest, with its three streams; the command is ended on exit.

        Raises:
            StateError: the machine is not running.
            GuestError: the guest cannot be reached.
        """
        with self._loop.within(self._async.process(argv, environment=environment)) as process:
            yield Process(self._loop, process)


class Remote(Twin[RemoteOVM]):
    """A machine that its service runs; :func:`ovm.sync.connect` returns one.

    Methods work as those of :class:`OVM` and raise the same errors, and ``StateError`` if the service has ended.
    """

    @property
    def name(self) -> str:
        """Name of the machine."""
        return self._async.name

    @property
    def service_version(self) -> str:
        """Version of ovm that the service runs; it may be older than this one."""
        return self._async.service_version

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The machine keeps running."""
        self._loop.run(self._async.aclose)
