"""The event loop behind the blocking API: one for the process, in a thread of its own."""

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
    """The loop has ended, and with it the machines on it; so does the interpreter."""


class Loop:
    """An event loop that runs in a thread until the interpreter exits; :meth:`current` is this process's.

    When it ends, running machines are shut down, as at the end of ``asyncio.run``.
    """

    _of_process: ClassVar[dict[int, Loop]] = {}
    """A forked process inherits those of its ancestors, which do not run in it; kept, for they are not to be ended."""
    _making: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def current(cls) -> Loop:
        """This process's, made when it is first needed.

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
            # not atexit: what it has called runs when executors take no more work, which a shutdown needs
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
        """Shut down every machine, and end. Ctrl-C meanwhile cuts their power, for then the process ends at once."""
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def run(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``function`` returns, awaited on the loop. An exception here, Ctrl-C for one, cancels it there first.

        Raises:
            StateError: it is another process's loop, or its own thread that calls.
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
        """What ``function`` returns, called on the loop."""

        async def called() -> T:
            return function(*args, **kwargs)

        return self.run(called)

    @contextlib.contextmanager
    def within(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Inside ``manager``."""
        entered = self.run(manager.__aenter__)
        try:
            yield entered
        except BaseException as error:
            if not self.run(manager.__aexit__, type(error), error, error.__traceback__):
                raise
        else:
            self.run(manager.__aexit__, None, None, None)

    def elsewhere(self, listener: Callable[..., object]) -> Callable[..., None]:
        """``listener`` for the loop to call; it runs in a thread for all of them, in which it may call and wait."""

        def tell(*told: object) -> None:
            try:
                if inspect.isawaitable(result := listener(*told)):
                    self.run(partial(_awaited, result))
            except Exception:
                log.exception("a listener failed")

        return lambda *told: _forget(self._listeners.submit(tell, *told))

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise StateError(
                f"this machine belongs to process {self._pid}, of which this one is a fork",
                hint="make it or connect() to it in this process",
            )
        if threading.current_thread() is self._thread:
            raise StateError(
                "a progress or output callback cannot call a machine and wait for it",
                hint="do it when the call that it belongs to has returned",
            )


class Stream(Iterator[T]):
    """What ``stream`` yields, waited for; it ends with the loop. A Ctrl-C loses nothing."""

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
    """It has told of its failures itself."""
