"""Progress output: a progress bar on a terminal, otherwise one plain line for each step."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from ovm.cli.outlet import say
from ovm.text.printable import printable

if TYPE_CHECKING:
    from ovm.cli import ProgressMode

Advance = Callable[[str, int, int], None]
"""Called with a description of the current work, the amount done and the total; 0 if unknown."""


class Steps(Protocol):
    """Shows steps, one after the other, on stderr; stdout is for results."""

    def step(self, label: str) -> contextlib.AbstractContextManager[Advance]:
        """Show the step ``label`` until the block ends."""


def steps(mode: ProgressMode) -> Steps:
    """Return the output that fits ``--progress`` and stderr."""
    if mode == "none":
        return _Silent()
    drawn = mode == "auto" and sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ
    return _Drawn() if drawn else _Plain()


class _Silent:
    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Advance]:  # noqa: ARG002 - nothing is shown
        yield lambda _what, _done, _total: None


class _Plain:
    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Advance]:
        begun = time.monotonic()
        yield lambda _what, _done, _total: None
        say(_finished(label, begun), err=True)


class _Drawn:
    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        begun = time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(printable(label), total=None)

            def advance(what: str, done: int, total: int) -> None:
                progress.update(task, description=printable(f"{label}: {what}"), completed=done, total=total or None)

            yield advance
        say(_finished(label, begun), err=True)


def _finished(label: str, begun: float) -> str:
    return f"{label}: {time.monotonic() - begun:.1f} s"
