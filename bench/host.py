"""This machine: what it is, and whether it is quiet."""

from __future__ import annotations

import asyncio
import os
import platform
from pathlib import Path

from bench.result import Host, Noise
from bench.setting import CPUS, MEMORY_MIB, Bench
from ovm.process.probe import show_version
from ovm.registry.images import load_image

LISTEN_S = 2.0


def describe(bench: Bench) -> Host:
    """What the numbers are of."""
    memory_kib = _field("/proc/meminfo", "MemTotal") or "0"
    return Host(
        cpu=_field("/proc/cpuinfo", "model name") or platform.machine(),
        cores=os.cpu_count() or 0,
        memory_gib=round(int(memory_kib.split()[0]) / 1024**2, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        qemu=show_version(bench.qemu.version),
        gvproxy=show_version(bench.gvproxy.version),
        accelerator=bench.accelerator,
        image=load_image(bench.image).sha256["rootfs"],
        guest_cpus=CPUS,
        guest_memory_mib=MEMORY_MIB,
    )


async def noise() -> Noise:
    """What others do, while we do nothing."""
    load = os.getloadavg()[0]
    idle, total = _ticks()
    await asyncio.sleep(LISTEN_S)
    idle_after, total_after = _ticks()
    return Noise(load=load, busy=1 - (idle_after - idle) / max(1, total_after - total))


def _ticks() -> tuple[int, int]:
    """The time that all processors have had nothing to do, and all of it."""
    first = Path("/proc/stat").read_text("utf-8").partition("\n")[0]
    ticks = [int(field) for field in first.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _field(path: str, name: str) -> str:
    """The value of a line ``name: value``; empty if there is none."""
    for line in Path(path).read_text("utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
