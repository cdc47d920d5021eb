"""What the tests of sleep and wake share: one who is told of them, and patience."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from ovm.power.clock_jump import Clocks
from ovm.power.filter import Edges

if TYPE_CHECKING:
    import pytest

PATIENCE_S = 20.0


async def until(condition: Callable[[], bool]) -> None:
    """Until ``condition`` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def turns(count: int = 5) -> None:
    """What is due in the event loop has happened."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.contextmanager
def time_to_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Awaitable[None]]]:
    """The event loop's clock stands still; what is yielded moves it by so many seconds and lets what is due happen."""
    loop = asyncio.get_running_loop()
    now_s = loop.time()

    async def pass_by(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        await turns()

    with monkeypatch.context() as patched:
        patched.setattr(loop, "time", lambda: now_s)
        yield pass_by


async def nothing() -> None:
    """What a callback does unless a test wants more of it."""


class HostClocks:
    """The host's clocks, which a test sets."""

    def __init__(self) -> None:
        self.wall_s, self.monotonic_s = 1e9, 1e3
        self.clocks = Clocks(lambda: self.wall_s, lambda: self.monotonic_s)

    def step(self, seconds: float) -> None:
        """As after a sleep, or a step of the clock."""
        self.wall_s += seconds

    def pass_by(self, seconds: float) -> None:
        """Awake."""
        self.wall_s += seconds
        self.monotonic_s += seconds


class Told:
    """Writes down what it is told; ``on_sleep`` and ``on_wake`` are what it does then."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.on_sleep: Callable[[], Awaitable[None]] = nothing
        self.on_wake: Callable[[], Awaitable[None]] = nothing
        self.host = HostClocks()
        self.edges = Edges(self.sleep, self.wake, self.host.clocks)

    async def sleep(self) -> None:
        await self._do("sleep", self.on_sleep)

    async def wake(self) -> None:
        await self._do("wake", self.on_wake)

    async def _do(self, word: str, work: Callable[[], Awaitable[None]]) -> None:
        self.words.append(word)
        try:
            await work()
        except asyncio.CancelledError:
            self.words.append(f"{word} cancelled")
            raise


async def hang() -> None:
    """Until cancelled."""
    await asyncio.Event().wait()


async def fail() -> None:
    """A callback that fails."""
    raise RuntimeError("it went wrong")
