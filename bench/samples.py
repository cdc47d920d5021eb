"""Measurements that are repeated: in an alternating order, and what is told of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

import msgspec

Unit = Literal["ms", "x", "%", "MiB", "MiB/s"]
"""``x``: a ratio."""
Measure = Callable[[], Awaitable[float]]
"""Does it once; returns the number."""

AGAIN = 2
"""How many runs of one row may be spoiled; with the next one it is given up."""
COMPARABLE = 3
"""Below so many values, nothing is known of how they vary."""


class SpoiledError(Exception):
    """What was measured is not to be counted, and may be measured once more; says why."""


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one row, in the order in which they were measured."""

    unit: Unit
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The largest."""
        return max(self.values)

    @property
    def smaller_is_better(self) -> bool:
        """Whether it is a cost."""
        return self.unit != "MiB/s"


class Recorder:
    """The rows of a run, each number as soon as it is known: what ends a run early does not lose them."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Unit, list[float]]] = {}
        self.spoiled: dict[str, list[str]] = {}
        """Why which runs of a row are not counted."""

    def add(self, row: str, value: float, unit: Unit = "ms") -> None:
        """One more number of ``row``."""
        self._values.setdefault(row, (unit, []))[1].append(value)

    async def unspoiled(self, row: str, measure: Measure) -> float | None:
        """Measure until it counts; ``None`` once ``row`` is given up."""
        spoiled = self.spoiled.setdefault(row, [])
        while len(spoiled) <= AGAIN:
            try:
                return await measure()
            except SpoiledError as error:
                spoiled.append(str(error))
        return None

    def rows(self) -> dict[str, Samples]:
        """All of them."""
        return {row: Samples(unit=unit, values=tuple(values)) for row, (unit, values) in self._values.items()}


async def alternate(
    sides: Mapping[str, Measure], recorder: Recorder, *, runs: int, warm_ups: int = 1, unit: Unit = "ms"
) -> None:
    """Measure each side ``runs`` times, by turns: there and back again, so that none always comes after the other.

    Before them each is done ``warm_ups`` times without being counted. A side that is given up ends none of the others.
    """
    order = list(sides.items())
    for run in range(-warm_ups, runs):
        for row, measure in order:
            value = await recorder.unspoiled(row, measure)
            if run >= 0 and value is not None:
                recorder.add(row, value, unit)
        order.reverse()


async def timed(work: Awaitable[object]) -> float:
    """The milliseconds it takes."""
    begun = time.perf_counter()
    await work
    return (time.perf_counter() - begun) * 1000
