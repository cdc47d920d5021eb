"""Virtual machines that nobody will boot."""

from __future__ import annotations

from pathlib import Path

from ovm.hypervisors import VMSpec

SMALLEST = VMSpec(
    arch="x86_64",
    cpus=1,
    memory_mib=256,
    kernel=Path("/k"),
    initrd=Path("/i"),
    cmdline="",
    disks=(),
    shares=(),
    channels=(),
    network_socket=Path("/n"),
    mac="5a:94:ef:e4:0c:ee",
    console_log=Path("/l"),
    control_socket=Path("/c"),
)
