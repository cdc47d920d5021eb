"""The power fails while containers sync what they write: all that was acknowledged is there when the guest boots again.

Killing QEMU proves nothing, for what it wrote is in the page cache of a host that lives on. So the writes to the data
disk are logged, and the disks that a cut of the power may leave are made from the log (tests/powercut).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

import full
import ovm
import soak
import under
from full import BUSYBOX_IMAGE, Podman, busybox_tar
from ovm.errors import OVMError
from ovm.host import programs
from ovm.image.build import host_arch
from powercut import records, tapped
from powercut.records import Acknowledged
from powercut.writelog import FLUSH, Cut, WriteLog

pytestmark = [
    pytest.mark.full,
    pytest.mark.soak,
    pytest.mark.skipif(under.MAC, reason="QEMU logs the writes"),
]
WRITING_S = 3.0 * soak.TENTHS
WRITING_UNSAFELY_S = 5.0
AT_LEAST = 60
"""Records, however slow the machine is."""
DISK_MIB = 2048
CONTAINER, VOLUME = "writer", "records"
WRITE = ["podman", "run", "--name", CONTAINER, "-v", f"{VOLUME}:/data", BUSYBOX_IMAGE, "perl", "-e", records.WRITER]
READ = ["tar", "-c", "-C", f"/var/lib/containers/storage/volumes/{VOLUME}/_data", "."]
NO_BOOT = "no boot"
TIMEOUT_S = 180.0
WRITTEN_BACK = 256
"""So many writes later even a disk that is never told to flush has written one."""


@dataclass(frozen=True)
class Recording:
    """What was written to the data disk of a machine, from its first use on to a cut of its power."""

    options: dict[str, Any]
    log: WriteLog
    acknowledged: Sequence[Acknowledged]

    def promised(self, position: int) -> dict[str, int]:
        """The last number of each kind that was acknowledged before the log was longer."""
        return {a.kind: a.number for a in self.acknowledged if self.log.position(a.log_size) <= position}

    def cut(self, number: int, chance: Random) -> Cut:
        """By turns right behind an acknowledgement and right before a flush; half lose all that may be lost."""
        position = self.log.position(chance.choice(self.acknowledged).log_size)
        if number % 2:
            position = self.log.next_flush(position)
        return Cut(position, (0.0, 0.3, 0.8, 0.0)[number % 4], chance.getrandbits(32))

    async def lost(self, cut: Cut, *, run: bool = False, **how: Any) -> list[str]:
        """What is not there after a real start with a disk that the cut left; ``run`` starts a container, too.

        Raises:
            OVMError: the machine does not start.
        """
        machine = await ovm.create_linux_ovm(self.options)
        disk = machine.options.target_dir / "data.img"
        await asyncio.to_thread(self.log.rebuild, disk, DISK_MIB << 20, cut, **how)
        podman = Podman(machine, disk.parent)
        try:
            await machine.start()
            asked = [("image", "exists", BUSYBOX_IMAGE), ("container", "exists", CONTAINER)]
            if run:
                asked.append(("run", "--rm", "-v", f"{VOLUME}:/data", BUSYBOX_IMAGE, "cat", "/data/appended"))
            lost = [f"podman {' '.join(words)}" for words in asked if (await podman(*words, check=False)).status]
            read = await machine.exec(READ, timeout_s=TIMEOUT_S)
        finally:
            await machine.stop(force=True)
        if read.exit_status:
            lost.append(f"the volume cannot be read: {read.stderr.decode(errors='replace')}")
        return lost or records.lost(self.promised(cut.position), records.unpacked(read.stdout))


async def record(
    image: Path, gvproxy: Path, base: Path, seconds: float, cache: tapped.Cache = "as shipped"
) -> Recording:
    """What a container that syncs what it writes gets done in some seconds."""
    options = full.options(base, image, gvproxy, data_disk_mib=DISK_MIB)
    plain = (await ovm.create_linux_ovm(options))._context.prepared.driver
    log = base / "writes"
    qemu = tapped.program(base / "qemu", (await programs.find_qemu(host_arch())).path, log, cache)
    machine = await ovm.create_linux_ovm(options, qemu=qemu, accelerator=plain.accelerator)
    acknowledged: list[Acknowledged] = []

    def heard(line: bytes) -> None:
        kind, number = line.split()
        acknowledged.append(Acknowledged(kind.decode(), int(number), log.stat().st_size))

    await machine.start()
    try:
        tar = await asyncio.to_thread(busybox_tar(base / "busybox.tar").read_bytes)
        done = await machine.exec(["podman", "import", "-", BUSYBOX_IMAGE], stdin=tar, timeout_s=TIMEOUT_S)
        assert done.exit_status == 0, done.stderr
        # what is not synced is no promise: podman syncs no layers
        await machine.exec(["sync"], timeout_s=TIMEOUT_S)
        async with machine.process(WRITE) as writer, asyncio.timeout(TIMEOUT_S):
            ends = None
            while ends is None or time.monotonic() < ends or len(acknowledged) < AT_LEAST:
                line = await writer.stdout.readline()
                assert line, f"the writer ended: {(await writer.stderr.read()).decode()}"
                heard(line)
                ends = ends or time.monotonic() + seconds
    finally:
        await machine.stop(force=True)
    return Recording(options, await asyncio.to_thread(WriteLog, log), acknowledged)


@pytest.fixture(scope="module")
async def recording(image: Path, gvproxy: Path) -> AsyncIterator[Recording]:
    """With the command line of every machine."""
    with tempfile.TemporaryDirectory(prefix="ovm-", dir="/tmp") as base:
        yield await record(image, gvproxy, Path(base), WRITING_S)


@pytest.fixture(scope="module")
def outcomes(recording: Recording) -> Iterator[list[list[str]]]:
    """What was lost by each cut."""
    found: list[list[str]] = []
    yield found
    failed = found.count([NO_BOOT])
    soak.row(
        f"{len(found)} power cuts during synced writes, {len(recording.acknowledged)} of them acknowledged",
        "0 lost, 0 failed boots",
        f"{sum(map(len, found)) - failed} lost, {failed} failed boots",
    )


@pytest.mark.parametrize("number", range(soak.times(30)))
async def test_power_cut(recording: Recording, outcomes: list[list[str]], number: int) -> None:
    """Whatever a cut leaves, the guest boots, podman knows its images and containers, and no synced record is lost."""
    cut = recording.cut(number, soak.random(f"power cut {number}"))
    outcomes.append([NO_BOOT])
    outcomes[-1] = await recording.lost(cut, run=number % 5 == 0)
    assert outcomes[-1] == [], f"seed {soak.SEED}, {cut} of {len(recording.log.operations)} operations"


async def test_a_disk_that_loses_a_flushed_write(recording: Recording) -> None:
    """One write is left out that a flush had made durable: it is noticed what was in it."""
    number = max(a.number for a in recording.acknowledged if a.kind == "renamed" and is_in_blocks(a.number))
    position = next(
        recording.log.position(a.log_size) for a in recording.acknowledged if (a.kind, a.number) == ("renamed", number)
    )
    durable = range(recording.log.flushed(position))
    (left_out,) = recording.log.find(records.record("renamed", number)[: records.BLOCK], durable)
    lost = await recording.lost(Cut(position, survives=1), without=[left_out])
    assert len(lost) == 1
    assert f"/{number}: " in lost[0], f"operation {left_out} of {len(durable)} was left out"


async def test_power_cut_with_unsafe_cache(image: Path, gvproxy: Path, short_path: Path) -> None:
    """Without the guest's flushes the same loses what was acknowledged, even if only the last few writes are lost."""
    recording = await record(image, gvproxy, short_path, WRITING_UNSAFELY_S, "unsafe")
    assert not [o for o in recording.log.operations if o.flags & FLUSH]
    position = recording.log.position(recording.acknowledged[-1].log_size)
    cut = Cut(position, 0.3, soak.random("unsafe").getrandbits(32))
    try:
        lost = await recording.lost(cut, durable=position - WRITTEN_BACK)
    except OVMError as error:
        lost = [error.message]
    soak.row(
        "1 power cut with cache=unsafe",
        "records lost, or no boot",
        f"{len(lost)} lost: {lost[0]:.60}" if lost else "none lost",
    )
    assert lost


def is_in_blocks(number: int) -> bool:
    """Smaller ones are among the metadata, which btrfs writes twice."""
    return len(records.record("renamed", number)) > records.BLOCK
