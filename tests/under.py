"""What the end-to-end tests run under: QEMU, and vfkit; each with the ``create`` that goes with it.

On Linux vfkit is the double of it; ``$OVM_TEST_VFKIT`` is a real one, on a Mac.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ovm

HYPERVISORS = ("vfkit",) if sys.platform == "darwin" else ("qemu", "vfkit")
QEMU_ALONE = pytest.mark.parametrize("hypervisor", ["qemu"], indirect=True)
VFKIT_ALONE = pytest.mark.parametrize("hypervisor", ["vfkit"], indirect=True)


def vfkit() -> Path:
    """The vfkit to run under."""
    if chosen := os.environ.get("OVM_TEST_VFKIT"):
        return Path(chosen)
    import doubles

    return doubles.vfkit()


async def create(options: Mapping[str, Any], **more: Any) -> ovm.OVM:
    """A machine under vfkit if there is one among the origins, else under QEMU."""
    origins = options.get("origin_path") or options["originPath"]
    under_vfkit = isinstance(origins, Mapping) and "vfkit" in origins
    return await (ovm.create_darwin_ovm if under_vfkit else ovm.create_linux_ovm)(options, **more)
