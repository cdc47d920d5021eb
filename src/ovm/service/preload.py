"""Import the modules that a running service needs later, because an upgrade may replace the package's files."""

from __future__ import annotations

import logging
import sys
from importlib import import_module

log = logging.getLogger(__name__)

_LATER = (
    "asyncssh",
    "dbus_fast.aio",
    "encodings.idna",
    "httpcore2",
    "ovm.disks.verify",
    "ovm.process.orphans",
    "ovm.machine.prune",
    "urllib.request",
)
"""Modules that are otherwise imported on first use, which may be long after the start."""


def everything() -> None:
    """Import them all. A module that this system lacks is not needed on it."""
    for name in _LATER:
        try:
            import_module(name)
        except ImportError as error:
            log.debug("cannot import %s: %s", name, error)


def imported() -> frozenset[str]:
    """Return the names of all modules imported so far."""
    return frozenset(sys.modules)


def complain(before: frozenset[str]) -> None:
    """Log a warning with the modules imported since ``before``."""
    if late := sorted(imported() - before):
        log.warning("imported after the machine was ready: %s", ", ".join(late))
