"""The names of machines in other programs."""

from __future__ import annotations


def label(name: str) -> str:
    """Return the name of the machine in docker and podman: ``ovm`` for the default one, ``ovm-NAME`` for others."""
    return "ovm" if name == "default" else f"ovm-{name}"
