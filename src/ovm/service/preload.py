"""What a running service may still need, imported while the package is surely there: an upgrade replaces its files."""

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
"""Imported where they are used, which may be long after the start."""


def everything() -> None:
    """Import them; those that this system does not have are not needed here either."""
    for name in _LATER:
        try:
            import_module(name)
        except ImportError as error:
            log.debug("%s is not to be had: %s", name, error)


def imported() -> frozenset[str]:
    """What has been imported up to now."""
    return frozenset(sys.modules)


def complain(before: frozenset[str]) -> None:
    """Write down what was imported since, for it should not have been."""
    if late := sorted(imported() - before):
        log.warning("imported after the machine was ready: %s", ", ".join(late))
