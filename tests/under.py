"""What the end-to-end tests run under: QEMU, and vfkit; each with the ``create`` that goes with it.

On Linux vfkit is the double of it; ``$OVM_TEST_VFKIT`` is a real one, on a Mac. What cannot be done there is told
here: such tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ovm

MAC = sys.platform == "darwin"
HYPERVISORS = ("vfkit",) if MAC else ("qemu", "vfkit")
QEMU_ALONE = pytest.mark.parametrize("hypervisor", ["qemu"], indirect=True)
VFKIT_ALONE = pytest.mark.parametrize("hypervisor", ["vfkit"], indirect=True)
QUICKER = "mitigations=off"
"""A word for the guest's kernel. Against attacks by speculative execution it does what costs an emulated guest a fifth
of its boot."""
LINUX_ALONE = {
    "test_arm64.py": "QEMU emulates its processor",
    "test_bench.py": "it measures machines under QEMU",
    "test_double.py": "the double of vfkit is a program for Linux",
    "test_frozen.py": "it watches processes by pidfds and /proc",
    "test_image_build.py": "images are built on Linux",
}
"""Files of tests that have nothing to test on a Mac, with the reason."""


def vfkit() -> Path:
    """The vfkit to run under."""
    if chosen := os.environ.get("OVM_TEST_VFKIT"):
        return Path(chosen)
    if MAC:
        pytest.skip("OVM_TEST_VFKIT does not name a vfkit")
    import doubles

    return doubles.vfkit()


def doubled() -> None:
    """Skip the test unless vfkit is the double, to which it gives orders."""
    if os.environ.get("OVM_TEST_VFKIT"):
        pytest.skip("it orders what the double of vfkit does, and this is a real one")


def program(*names: str) -> str:
    """The first of these programs that is there; on a Mac, where not every one can be had, tests go without."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if found := next(filter(None, (shutil.which(name, path=path) for name in names)), None):
        return found
    if MAC:
        pytest.skip(f"there is no {' and no '.join(names)}")
    pytest.fail(f"{names[0]} is missing: scripts/setup test")


async def create(options: Mapping[str, Any], **more: Any) -> ovm.OVM:
    """A machine under vfkit if there is one among the origins, else under QEMU."""
    origins = options.get("origin_path") or options["originPath"]
    under_vfkit = isinstance(origins, Mapping) and "vfkit" in origins
    return await (ovm.create_darwin_ovm if under_vfkit else ovm.create_linux_ovm)(options, **more)
