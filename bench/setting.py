"""What a run is made with: how much of everything, with which programs, where, and who is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.samples import Recorder
from ovm.host.programs import Helper

CPUS = 2
MEMORY_MIB = 2048
BOOT_DEADLINE_S = 90.0
"""Of each cold start that is measured, whoever makes it: under QEMU's TCG a kernel hangs now and then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How often, how long, how large."""

    runs: int = 5
    warm_ups: int = 1
    commands: int = 15
    """Runs of commands that take milliseconds."""
    resumes: int = 20
    rested_s: float = 2.0
    """Before each pause: what the guest does after its boot, or after the last resume, is not what is measured."""
    streams: int = 20
    """How often the guest is sent something: what two ports let through differs by little."""
    stream_mib: int = 16
    """What is sent to the guest at once."""
    idle_s: float = 60.0
    machines: int = 50
    """How many are listed, at most."""
    rootfs_mib: int | None = None
    """How much of the root file system is unpacked and copied; all of it for ``None``."""
    stock: bool = True


FULL = Scale()
SMOKE = Scale(
    runs=1,
    warm_ups=0,
    commands=1,
    resumes=1,
    rested_s=0.0,
    streams=1,
    stream_mib=4,
    idle_s=0.5,
    machines=5,
    rootfs_mib=32,
    stock=False,
)


class NotHereError(Exception):
    """Something cannot be measured on this machine; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A run."""

    scale: Scale
    image: Path
    gvproxy: Helper
    qemu: Helper
    accelerator: str
    cache: Path
    """What is kept for the next run."""
    work: Path
    """What is removed at the end."""
    tell: Callable[[str], None]
    """Called with what is being done."""
    recorder: Recorder = field(default_factory=Recorder)
    missing: dict[str, str] = field(default_factory=dict)
