"""The log of a process of ours: each record begins on a line of its own, and no other line looks like one.

What a guest or a helper says reaches the log in many ways, exceptions of libraries among them. So the last step before
the file or terminal is the filter, whoever has logged what.
"""

from __future__ import annotations

import logging
import os

from ovm.text.printable import printable

SERVICE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
COMMAND_FORMAT = "ovm: %(message)s"
CONTINUED = "    | "
"""Begins each further line of a record: of an error with its evidence, or of a traceback."""
_CHATTY = ("httpx2", "httpcore2", "asyncssh", "uvicorn", "asyncio")


class Formatter(logging.Formatter):
    """Makes every line of a record fit to print, and marks all but its first."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines of ``record``."""
        first, *others = super().format(record).split("\n")
        return "\n".join([printable(first), *(CONTINUED + printable(line) for line in others)])


def begin() -> None:
    """Write the log of a service to stderr, which is its file; with ``OVM_DEBUG`` in the environment, all of it."""
    _to_stderr(SERVICE_FORMAT, logging.DEBUG if os.environ.get("OVM_DEBUG") else logging.INFO)


def begin_command() -> None:
    """Write what a command logs, from warnings up, to stderr."""
    _to_stderr(COMMAND_FORMAT, logging.WARNING)


def _to_stderr(form: str, level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(form))
    logging.basicConfig(level=level, handlers=[handler])
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
