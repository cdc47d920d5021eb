"""Rate-limited logging, so that a guest cannot flood a log."""

from __future__ import annotations

import time
from collections.abc import Callable

LINES_MAX = 20
"""Lines of one kind in each PERIOD_S."""
PERIOD_S = 60.0


class Sparing:
    """Logs lines of one kind through ``tell``: at most LINES_MAX in PERIOD_S.

    The first line of the next period is followed by the number of suppressed lines.
    """

    def __init__(self, tell: Callable[[str], object], kind: str) -> None:
        self._tell = tell
        self._kind = kind
        self._began = -PERIOD_S
        self._lines = 0

    def __call__(self, line: str) -> None:
        """Log ``line``, or count it as suppressed."""
        now = time.monotonic()
        left_out = 0
        if now - self._began >= PERIOD_S:
            left_out = max(0, self._lines - LINES_MAX)
            self._began, self._lines = now, 0
        self._lines += 1
        if self._lines <= LINES_MAX:
            self._tell(line)
        if self._lines == LINES_MAX:
            self._tell(f"{self._kind}: further ones within {PERIOD_S:g} s are counted, not logged")
        if left_out:
            self._tell(f"{self._kind}: {left_out} were not logged")
