"""A data disk that is damaged is reported, with what can be done, and never written to: not even formatted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

import ovm
import under
from full import BUSYBOX_IMAGE, MachineOptions, Podman, busybox_tar
from ovm.disks.data import load_machine, save_machine
from ovm.paths import TargetPaths

pytestmark = [pytest.mark.full, under.QEMU_ALONE]

MIB = 1 << 20
SUPERBLOCK = 64 << 10
LABEL_AT = 0x12B
SIZE_MIB = 512
NODE_BYTES = 16 << 10
SPOILT = b"read it and weep" * 512
RECOVERED = 2
"""With what status ``btrfs rescue super-recover`` ends when it has."""


class Disk:
    """A machine's data disk, and how to break it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, content: bytes, at: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(content)

    def flip(self, at: int) -> None:
        """Change one byte."""
        with self.path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0xFF]))

    def tree(self, name: str) -> list[int]:
        """Where both copies of the root of a tree are: ``root``, ``chunk_root`` or ``log_root``."""
        shown = self.btrfs("inspect-internal", "dump-super")
        found = re.search(rf"^{name}\s+(\d+)$", shown, re.MULTILINE)
        assert found, shown
        assert int(found[1]), f"the disk has no {name}"
        at, chunks = int(found[1]), self.btrfs("inspect-internal", "dump-tree", "-t", "chunk")
        for chunk in chunks.split("CHUNK_ITEM ")[1:]:
            begin, length = int(chunk.split(")")[0]), int(re.findall(r"length (\d+)", chunk)[0])
            if begin <= at < begin + length:
                copies = [at - begin + int(offset) for offset in re.findall(r"stripe \d devid 1 offset (\d+)", chunk)]
                assert len(copies) == 2, chunk
                return copies
        raise AssertionError(chunks)

    def break_tree(self, name: str, *, copies: int = 2) -> None:
        """Overwrite the root of a tree, in so many of its copies."""
        for at in self.tree(name)[:copies]:
            self.write(b"\xa5" * NODE_BYTES, at)

    def btrfs(self, *words: str, status: int = 0) -> str:
        """What a program of btrfs-progs on the host says of it."""
        command = [under.program("btrfs"), *words, str(self.path)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == status, done
        return done.stdout

    def make(self, *words: str) -> None:
        """Put another file system in the place of whatever it carried."""
        self.empty()
        subprocess.run([under.program(words[0]), *words[1:], self.path], check=True, capture_output=True)

    def empty(self) -> None:
        size = self.path.stat().st_size
        os.truncate(self.path, 0)
        os.truncate(self.path, size)

    def digest(self) -> str:
        """Of its content and size, wherever its holes are."""
        digest = hashlib.sha256(str(self.path.stat().st_size).encode())
        with self.path.open("rb", buffering=0) as file:
            for at in _data(file.fileno()):
                if (content := os.pread(file.fileno(), MIB, at)).strip(b"\0"):
                    digest.update(f"{at} ".encode() + content)
        return digest.hexdigest()


def _data(fd: int) -> Iterator[int]:
    """Where each MiB begins that is not a hole alone."""
    at, size = 0, os.fstat(fd).st_size
    with contextlib.suppress(OSError):  # ENXIO: nothing but a hole to the end
        while at < size:
            at = os.lseek(fd, at, os.SEEK_DATA) // MIB * MIB
            yield at
            at += MIB


@dataclass(frozen=True)
class Damage:
    """Something that happens to a disk, and what its machine then says."""

    done: Callable[[Disk], object]
    code: str
    words: str


DAMAGES = {
    "first superblock gone": Damage(
        lambda disk: disk.write(bytes(4096), SUPERBLOCK), "data-superblock-damaged", "is gone"
    ),
    "first superblock damaged": Damage(
        lambda disk: disk.flip(SUPERBLOCK + 0x48), "data-superblock-damaged", "superblock checksum mismatch"
    ),
    "its label damaged": Damage(lambda disk: disk.flip(SUPERBLOCK + LABEL_AT), "data-superblock-damaged", "is damaged"),
    "tree of trees gone": Damage(lambda disk: disk.break_tree("root"), "data-damaged", "cannot be mounted: .*root"),
    "log damaged": Damage(lambda disk: disk.break_tree("log_root"), "data-log-damaged", "cannot be mounted: .*log"),
    "cut": Damage(lambda disk: os.truncate(disk.path, SIZE_MIB * MIB // 2), "data-damaged", "mounted: .*device"),
    "emptied": Damage(Disk.empty, "data-unformatted", "has no file system"),
    "another btrfs": Damage(
        lambda disk: disk.make("mkfs.btrfs", "-q", "-L", "mine"), "data-foreign", "other than ovm-data"
    ),
}


@pytest.fixture(scope="module")
async def used(options_for: MachineOptions, tmp_path_factory: pytest.TempPathFactory) -> Used:
    """A machine with a volume and a file that went bad, whose power was cut just after something had been synced."""
    machine = await under.create(options_for("damage", data_disk_mib=SIZE_MIB))
    disk = Disk(machine.options.target_dir / "data.img")
    home = tmp_path_factory.mktemp("podman")
    podman = Podman(machine, home)
    volume = "cd /var/lib/containers/storage/volumes/kept/_data"
    async with machine:
        await podman("import", busybox_tar(home / "busybox.tar"), BUSYBOX_IMAGE)
        await podman("run", "--rm", "-v", "kept:/data", BUSYBOX_IMAGE, "sh", "-c", "echo precious >/data/file")
        await machine.exec(["sh", "-c", f"{volume} && cat >spoilt && sync"], stdin=SPOILT)
        disk.flip(disk.path.read_bytes().index(SPOILT))
        forget = "echo 3 >/proc/sys/vm/drop_caches"
        read = await machine.exec(["sh", "-c", f"{forget}; {volume}; cat spoilt; touch .; sync"])
        assert b"Input/output error" in read.stderr
        assert int((await machine.exec(["/usr/lib/ovm/health"])).text.split()[3]) > 0
        keep_log = "mount -o remount,commit=3000 /var/lib/ovm"
        await machine.exec(["sh", "-c", f"{keep_log} && {volume} && echo synced >later && sync later"])
        await machine.stop(force=True)
    whole = home / "data.img"
    copy(disk.path, whole)
    return Used(machine, podman, disk, whole)


def copy(source: Path, target: Path) -> None:
    """A sparse file as a sparse file."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, target], check=True)


@dataclass(frozen=True)
class Used:
    """A machine that is stopped, its data disk, and a copy of that."""

    machine: ovm.OVM
    podman: Podman
    disk: Disk
    whole: Path

    def restore(self) -> None:
        copy(self.whole, self.disk.path)


@pytest.mark.parametrize("name", DAMAGES)
async def test_a_damaged_disk_is_reported_and_left_as_it_is(used: Used, name: str) -> None:
    """The start fails with what the guest found and what to do about it, and not a byte of the disk is changed."""
    damage = DAMAGES[name]
    used.restore()
    damage.done(used.disk)
    before = used.disk.digest()
    with pytest.raises(ovm.GuestRefused) as refused:
        await used.machine.start()
    assert refused.value.stage == damage.code
    assert re.search(damage.words, refused.value.message), refused.value.message
    assert "reset_path(data=True)" in refused.value.hint or damage.code == "data-foreign"
    assert used.disk.digest() == before


async def test_another_file_system_is_not_formatted(used: Used) -> None:
    """Not even where the host has never seen a guest ready with it, and so allows formatting."""
    used.disk.make("mkfs.ext4", "-q", "-F")
    before = used.disk.digest()
    target = TargetPaths(used.machine.options.target_dir)
    record = load_machine(target)
    save_machine(target, msgspec.structs.replace(record, data_ever_ready=False))
    try:
        with pytest.raises(ovm.GuestRefused) as refused:
            await used.machine.start()
    finally:
        save_machine(target, record)
    assert refused.value.stage == "data-foreign"
    assert used.disk.digest() == before


async def test_what_the_hints_say_helps(used: Used, caplog: pytest.LogCaptureFixture) -> None:
    """A disk repaired as the hints say, or by btrfs from a second copy, has its files; that it was bad is told."""
    used.restore()
    used.disk.break_tree("log_root")
    used.disk.btrfs("rescue", "zero-log")
    used.disk.write(bytes(4096), SUPERBLOCK)
    used.disk.btrfs("rescue", "super-recover", "-y", status=RECOVERED)
    used.disk.break_tree("root", copies=1)
    async with used.machine:
        assert "the data disk has had" in caplog.text
        read = await used.podman("run", "--rm", "-v", "kept:/data", BUSYBOX_IMAGE, "cat", "/data/file")
        assert read.out == "precious"
