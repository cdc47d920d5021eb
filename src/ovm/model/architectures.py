"""The processors that guests run on, and what each of them is called by whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arch = Literal["x86_64", "aarch64"]
"""As QEMU and Linux's ``uname`` call it."""
DebianArch = Literal["amd64", "arm64"]
"""As Debian and container images call it."""
KernelArch = Literal["x86_64", "arm64"]
"""As the Linux source does."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One processor by its names."""

    machine: Arch
    debian: DebianArch
    kernel: KernelArch

    @property
    def qemu(self) -> str:
        """The program that runs guests on it."""
        return f"qemu-system-{self.machine}"


ARCHITECTURES = (Architecture("x86_64", "amd64", "x86_64"), Architecture("aarch64", "arm64", "arm64"))


def of(machine: Arch) -> Architecture:
    """Return the architecture that ``uname`` calls ``machine``."""
    return next(one for one in ARCHITECTURES if one.machine == machine)


def find(name: str) -> Architecture | None:
    """Return the architecture that anybody calls ``name``, in any case of its letters; ``None`` if there is none."""
    name = name.lower()
    return next((one for one in ARCHITECTURES if name in {one.machine, one.debian, one.kernel}), None)
