"""The event loop of the blocking API: one per process, in its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, ClassVar, ParamSpec, TypeVar

from ovm.errors import StateError

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


class Over(StateError):
    """The interpreter is exiting; the loop and its machines have ended."""


class Loop:
    """An event loop that runs in a thread until the interpreter exits; :meth:`current` returns this process's.

    When it ends, running machines are shut down, as at the end of ``asyncio.run``.
    """

    _of_process: ClassVar[dict[int, Loop]] = {}
    """By process id: a forked process also has its ancestors' loops, which do not run in it and must not be ended."""
    _making: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def current(cls) -> Loop:
        """Return this process's loop; creates it on first use.

        Raises:
            StateError: the interpreter is exiting.
        """
        with cls._making:
            pid = os.getpid()
            if pid not in cls._of_process:
                cls._of_process[pid] = cls()
            return cls._of_process[pid]

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._waiting: set[Future[Any]] = set()
        self._listeners = ThreadPoolExecutor(1, thread_name_prefix="ovm.sync listeners")
        self._over: asyncio.Event
        began: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._live, args=(began,), name="ovm.sync", daemon=True)
        try:
            # not atexit: its callbacks run when executors accept no more work, but a shutdown needs executors
            threading._register_atexit(self.end)  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise Over("the interpreter is exiting") from error
        self._thread.start()
        self._loop = began.result()

    def _live(self, began: Future[asyncio.AbstractEventLoop]) -> None:
        async def stay() -> None:
            self._over = asyncio.Event()
            began.set_result(asyncio.get_running_loop())
            await self._over.wait()

        try:
            asyncio.run(stay())
        finally:
            for outcome in tuple(self._waiting):
                _fail(outcome)

    def end(self) -> None:
        """Shut down every machine and end the loop. Ctrl-C meanwhile cuts their power: the process ends at once."""
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def run(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await ``function`` on the loop and return its result.

        An exception in this thread, such as Ctrl-C, first cancels the call on the loop and waits for its end.

        Raises:
            StateError: the loop belongs to another process, or the caller runs in the loop's own thread.
        """
        self._check()
        outcome: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        async def call() -> T:
            return await function(*args, **kwargs)

        def begin() -> None:
            tasks.append(self._loop.create_task(call()))
            tasks[0].add_done_callback(partial(_settle, outcome))

        def cancel() -> None:
            tasks[0].cancel()

        self._waiting.add(outcome)
        try:
            try:
                self._loop.call_soon_threadsafe(begin)
            except RuntimeError:
                _fail(outcome)
            return outcome.result()
        except BaseException:
            if not outcome.done():
                with contextlib.suppress(RuntimeError):  # it has just ended
                    self._loop.call_soon_threadsafe(cancel)
                outcome.exception()
            raise
        finally:
            self._waiting.discard(outcome)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` on the loop and return its result."""

        async def called() -> T:
            return function(*args, **kwargs)

        return self.run(called)

    @contextlib.contextmanager
    def within(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Enter and exit ``manager`` on the loop."""
        entered = self.run(manager.__aenter__)
        try:
            yield entered
        except BaseException as error:
            if not self.run(manager.__aexit__, type(error), error, error.__traceback__):
                raise
        else:
            self.run(manager.__aexit__, None, None, None)

    def elsewhere(self, listener: Callable[..., object]) -> Callable[..., None]:
        """Return a callback for the loop that runs ``listener`` in the listeners' thread, where it may block."""

        def tell(*told: object) -> None:
            try:
                if inspect.isawaitable(result := listener(*told)):
                    self.run(partial(_awaited, result))
            except Exception:
                log.exception("a listener raised")

        return lambda *told: _forget(self._listeners.submit(tell, *told))

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise StateError(
                f"this machine belongs to process {self._pid}, and this process is a fork of it",
                hint="create the machine or connect() to it in this process",
            )
        if threading.current_thread() is self._thread:
            raise StateError(
                "a progress or output callback cannot make a blocking call to a machine",
                hint="call the machine after the call with the callback has returned",
            )


class Stream(Iterator[T]):
    """A blocking iterator over ``stream``; it ends with the loop. Ctrl-C loses no item."""

    def __init__(self, loop: Loop, stream: AsyncIterator[T]) -> None:
        self._loop, self._stream = loop, stream

    def __next__(self) -> T:
        try:
            return self._loop.run(self._stream.__anext__)
        except (StopAsyncIteration, Over):
            raise StopIteration from None


async def _awaited(result: Awaitable[T]) -> T:
    return await result


def _settle(outcome: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        _fail(outcome)
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


def _fail(outcome: Future[Any]) -> None:
    if not outcome.done():
        outcome.set_exception(Over("this was cancelled, because the interpreter is exiting"))


def _forget(_future: Future[None]) -> None:
    """Ignore the result: the callback has logged its errors."""
