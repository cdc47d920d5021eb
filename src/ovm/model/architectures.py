"""Processor architectures of guests, and their names in different tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arch = Literal["x86_64", "aarch64"]
"""Name in QEMU and ``uname``."""
DebianArch = Literal["amd64", "arm64"]
"""Name in Debian and container images."""
KernelArch = Literal["x86_64", "arm64"]
"""Name in the Linux source."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture, by its names."""

    machine: Arch
    debian: DebianArch
    kernel: KernelArch

    @property
    def qemu(self) -> str:
        """Name of the QEMU program for it."""
        return f"qemu-system-{self.machine}"


ARCHITECTURES = (Architecture("x86_64", "amd64", "x86_64"), Architecture("aarch64", "arm64", "arm64"))


def of(machine: Arch) -> Architecture:
    """Return the architecture whose ``uname`` name is ``machine``."""
    return next(one for one in ARCHITECTURES if one.machine == machine)


def find(name: str) -> Architecture | None:
    """Return the architecture with any of its names equal to ``name``, ignoring case; ``None`` if there is none."""
    name = name.lower()
    return next((one for one in ARCHITECTURES if name in {one.machine, one.debian, one.kernel}), None)
