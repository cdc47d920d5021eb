"""The files of a machine are verified while it runs, and running it changes none."""

from __future__ import annotations

import pytest

import tiny
from ovm.cli.doctor import check_files
from ovm.disks.verify import verify

pytestmark = pytest.mark.tiny


async def test_a_byte_that_changes_under_a_running_machine_is_found(machines: tiny.Machines) -> None:
    """Verification finds a byte that changed under a running machine."""
    m = await machines()
    target = m.ovm.options.target_dir
    async with m.ovm:
        assert {file.state for file in await verify(target)} == {"ok"}
        rootfs = next(file.path for file in await verify(target) if file.name == "rootfs")
        assert rootfs is not None
        with rootfs.open("r+b") as opened:
            opened.seek(-1, 2)
            byte = opened.read(1)[0]
            opened.seek(-1, 2)
            opened.write(bytes([byte ^ 1]))
        found = {check.name: check for check in await check_files(f"{target}")}
        assert {name for name, check in found.items() if check.status != "ok"} == {f"{target}: rootfs"}
        assert found[f"{target}: rootfs"].status == "damaged"
    await m.ovm.reset_path()
    assert {file.state for file in await verify(target)} == {"ok"}
