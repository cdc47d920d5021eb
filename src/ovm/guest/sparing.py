"""A log that a guest cannot flood: so many lines in a while, then the number of those that were left out."""

from __future__ import annotations

import time
from collections.abc import Callable

LINES_MAX = 20
"""Of one kind, in each PERIOD_S."""
PERIOD_S = 60.0


class Sparing:
    """Logs lines of one kind through ``tell``: at most LINES_MAX in PERIOD_S.

    The first line after that is followed by how many were left out before it.
    """

    def __init__(self, tell: Callable[[str], object], kind: str) -> None:
        self._tell = tell
        self._kind = kind
        self._began = -PERIOD_S
        self._lines = 0

    def __call__(self, line: str) -> None:
        """Log ``line``, or count it as left out."""
        now = time.monotonic()
        left_out = 0
        if now - self._began >= PERIOD_S:
            left_out = max(0, self._lines - LINES_MAX)
            self._began, self._lines = now, 0
        self._lines += 1
        if self._lines <= LINES_MAX:
            self._tell(line)
        if self._lines == LINES_MAX:
            self._tell(f"{self._kind}: more of them in {PERIOD_S:g} s are counted, not logged")
        if left_out:
            self._tell(f"{self._kind}: {left_out} were not logged")
