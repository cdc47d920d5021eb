"""Room on the data disk: the host gets back what is freed, a full disk still boots, and a larger one is filled out."""

from __future__ import annotations

from pathlib import Path

import pytest

import ovm
import under
from full import BUSYBOX_IMAGE, MachineOptions, Podman, busybox_tar, eventually
from ovm.machine import prune

pytestmark = [pytest.mark.full, under.QEMU_ALONE]

MIB = 1 << 20
FILL = """
cd /var/lib/containers/storage/volumes/big/_data
dd if=/dev/zero of=file bs=1M
sync
dd if=/dev/zero of=rest bs=4k
sync
"""


async def health(machine: ovm.OVM) -> tuple[int, int, str, int]:
    """What the guest says of its data disk: size, free, whether it can be written, errors."""
    size, free, mode, errors = (await machine.exec(["/usr/lib/ovm/health"])).text.split(" ")
    return int(size), int(free), mode, int(errors)


async def test_a_life_in_little_room(options_for: MachineOptions, tmp_path: Path) -> None:
    """Written, removed and given back; filled to the brim, booted, pruned; and made larger."""
    options = options_for("space", data_disk_mib=512)
    disk = options["target_dir"] / "data.img"
    machine = await under.create(options)
    podman = Podman(machine, tmp_path)
    archive = busybox_tar(tmp_path / "busybox.tar")

    def occupied() -> int:
        return disk.stat().st_blocks * 512

    async def fill() -> None:
        """Until nothing more can be written, which podman finds out too."""
        await podman("run", "-v", "big:/data", BUSYBOX_IMAGE, "true")
        assert b"No space left" in (await machine.exec(["sh", "-c", FILL])).stderr
        assert "no space left" in (await podman("import", archive, "localhost/more", check=False)).err

    async def reserved() -> bool:
        return (await machine.exec(["test", "-e", "/var/lib/ovm/reserve"])).exit_status == 0

    async with machine:
        size, free, mode, errors = await health(machine)
        assert (size, mode, errors) == (512 * MIB, "rw", 0)
        assert 256 * MIB < free < size
        await eventually(reserved)
        await podman("import", archive, BUSYBOX_IMAGE)
        await podman("run", "--rm", "-v", "kept:/data", BUSYBOX_IMAGE, "sh", "-c", "echo precious >/data/file; sync")
        before = occupied()
        write = "tr '\\0' x </dev/zero | head -c 200000000 >/data/file; sync"
        await podman("run", "-v", "doomed:/data", BUSYBOX_IMAGE, "sh", "-c", write)
        assert occupied() > 200_000_000
        assert (await machine.prune()).removed["containers"] == 1
        assert occupied() > 200_000_000, "a volume was removed that nobody asked for"
        await podman("run", "-d", "--name", "user", "-v", "kept:/data", BUSYBOX_IMAGE, "sleep", "1000")
        done = await machine.prune(volumes=True)
        assert done.removed == {"pods": 0, "containers": 0, "images": 0, "networks": 0, "volumes": 1}
        assert done.freed_bytes["volumes"] >= 200_000_000
        assert done.trimmed_bytes is not None
        assert done.trimmed_bytes >= 200_000_000
        assert occupied() < before + 32 * MIB
        await podman("rm", "-f", "-t", "0", "user")
        await fill()

    machine = podman.machine = await under.create(options)
    async with machine:
        assert (await health(machine))[1] < 64 * MIB
        done = await machine.prune(everything=True)
        assert done.removed["containers"] == 1

    machine = podman.machine = await under.create(options | {"data_disk_mib": 1024})
    async with machine:
        size, free, mode, errors = await health(machine)
        assert (size, mode, errors) == (1024 * MIB, "rw", 0)
        assert free > 256 * MIB
        assert (await machine.exec(["cat", "/var/lib/containers/storage/volumes/kept/_data/file"])).text == "precious"
        await podman("volume", "rm", "big")
        await prune.trim(machine._context.session.ssh)
        assert occupied() < before + 32 * MIB
        assert await reserved()
