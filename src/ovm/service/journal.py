"""The log of an ovm process: each record begins on its own line, and no other line looks like a record.

Output of a guest or a helper reaches the log in many ways, for example in exceptions of libraries. So everything is
made printable in the last step before the file or terminal.
"""

from __future__ import annotations

import logging
import os

from ovm.text.printable import printable

SERVICE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
COMMAND_FORMAT = "ovm: %(message)s"
CONTINUED = "    | "
"""Prefix of each further line of a record, such as an error's evidence or a traceback."""
_CHATTY = ("httpx2", "httpcore2", "asyncssh", "uvicorn", "asyncio")


class Formatter(logging.Formatter):
    """Makes every line of a record printable, and prefixes all but the first."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of ``record``."""
        first, *others = super().format(record).split("\n")
        return "\n".join([printable(first), *(CONTINUED + printable(line) for line in others)])


def begin() -> None:
    """Log to stderr, which is the service's log file; with ``OVM_DEBUG`` set, at debug level."""
    _to_stderr(SERVICE_FORMAT, logging.DEBUG if os.environ.get("OVM_DEBUG") else logging.INFO)


def begin_command() -> None:
    """Log a command's warnings and errors to stderr."""
    _to_stderr(COMMAND_FORMAT, logging.WARNING)


def _to_stderr(form: str, level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(form))
    logging.basicConfig(level=level, handlers=[handler])
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
