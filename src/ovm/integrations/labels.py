"""What other programs call a machine."""

from __future__ import annotations


def label(name: str) -> str:
    """What docker and podman call the machine ``name``: ``ovm`` for the default one, ``ovm-NAME`` for others."""
    return "ovm" if name == "default" else f"ovm-{name}"
