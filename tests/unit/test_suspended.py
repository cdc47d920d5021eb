"""The memory of a suspended machine: what is loaded is what was written, and it goes once it is used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest

from ovm.disks import saved_state
from ovm.disks.saved_state import Suspended, Unfit
from ovm.errors import FileError
from ovm.machine.suspend import Recall, _disk
from ovm.paths import TargetPaths

FACTS = {"the rootfs": "1 2 3", "the kernel": "4 5 6"}
TOLD = {"at": 1.0, "facts": FACTS, "ssh_port": 2222, "podman_port": None, "forwards": ()}
CONTENT = os.urandom(1024) + bytes(2 * saved_state.PIECE_BYTES) + os.urandom(100)


@pytest.fixture
def target(tmp_path: Path) -> TargetPaths:
    """A machine's directory with a memory in it."""
    paths = TargetPaths(tmp_path)
    memory = saved_state.new_memory(paths)
    os.write(memory.fd, CONTENT)
    saved_state.keep(paths, memory, **TOLD)
    return paths


def taken(target: TargetPaths) -> Suspended:
    """As a start takes it."""
    record = saved_state.load(target)
    fd = saved_state.open_memory(target)
    try:
        saved_state.check_memory(fd, record)
    finally:
        os.close(fd)
    return record


def test_what_was_kept_is_told_again(target: TargetPaths) -> None:
    record = taken(target)
    assert record.facts == FACTS
    assert (record.ssh_port, record.podman_port, record.size) == (2222, None, len(CONTENT))
    assert len(record.pieces) == 3
    for path in (target.memory, target.suspended):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in target.directory.iterdir()) == ["memory.suspended", "suspended.json"]


@pytest.mark.parametrize("name", ["memory", "suspended"])
@pytest.mark.parametrize("where", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("how", ["flip", "cut", "grow"])
def test_any_damage_is_seen(target: TargetPaths, name: str, where: float, how: str) -> None:
    path: Path = getattr(target, name)
    content = bytearray(path.read_bytes())
    at = min(int(len(content) * where), len(content) - 1)
    match how:
        case "flip":
            content[at] ^= 1 << (at % 8)
        case "cut":
            del content[at:]
        case "grow":
            content.insert(at, 7)
    path.write_bytes(content)
    with pytest.raises(Unfit, match="damaged"):
        taken(target)


@pytest.mark.parametrize("name", ["memory", "suspended"])
def test_one_alone_is_nothing(target: TargetPaths, name: str) -> None:
    getattr(target, name).unlink()
    with pytest.raises(Unfit, match="cannot be read"):
        taken(target)


@pytest.mark.parametrize("change", [{"format": 2}, {"facts": 3}, {"pieces": "x"}, {"size": None}])
def test_another_version_is_told_apart(target: TargetPaths, change: dict[str, object]) -> None:
    """Its record is whole, but not understood."""
    told = msgspec.json.decode(target.suspended.read_bytes().splitlines()[0]) | change
    line = msgspec.json.encode(told)
    target.suspended.write_bytes(line + b"\n%08x\n" % saved_state._crc32(line))
    with pytest.raises(Unfit, match="another version"):
        taken(target)


def test_nothing_is_left_of_it(target: TargetPaths) -> None:
    assert saved_state.is_there(target)
    saved_state.new_memory(target)  # of a suspend that was killed
    saved_state.discard(target)
    assert not saved_state.is_there(target)
    assert list(target.directory.iterdir()) == []
    saved_state.discard(target)


def test_what_cannot_be_removed_is_an_error(tmp_path: Path) -> None:
    """Or the next start would go on from it."""
    target = TargetPaths(tmp_path)
    target.suspended.mkdir()
    with pytest.raises(FileError, match="cannot be removed"):
        saved_state.discard(target)


def test_another_file_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert saved_state.identity(path) == "missing"
    path.write_bytes(b"one")
    first = saved_state.identity(path)
    assert saved_state.identity(path) == first
    os.utime(path, ns=(0, 0))
    assert saved_state.identity(path) != first


async def recalled(target: TargetPaths, now: dict[str, str], *, wanted: bool = True) -> tuple[bool, list[str]]:
    """Whether a start would go on from what is there, and what it is told otherwise."""
    told: list[str] = []
    recall = Recall(wanted=wanted, given_up=told.append)
    await recall.look(target, now)
    whole = await recall.is_whole()
    await recall.close()
    return whole, told


@pytest.fixture
def beside_a_disk(tmp_path: Path) -> TargetPaths:
    """A memory with a data disk."""
    target = TargetPaths(tmp_path)
    target.data_disk.write_bytes(os.urandom(100_000))
    memory = saved_state.new_memory(target)
    os.write(memory.fd, CONTENT)
    saved_state.keep(target, memory, **{**TOLD, "facts": {**FACTS, **_disk(target)}})
    return target


async def test_it_goes_with_the_same_machine(beside_a_disk: TargetPaths) -> None:
    assert await recalled(beside_a_disk, FACTS) == (True, [])
    assert saved_state.is_there(beside_a_disk), "until it is used"


async def test_it_goes_with_no_other(beside_a_disk: TargetPaths) -> None:
    whole, told = await recalled(beside_a_disk, {**FACTS, "the rootfs": "9 9 9"})
    assert not whole
    assert told == ["changed since it was suspended: the rootfs"]
    assert [path.name for path in beside_a_disk.directory.iterdir()] == ["data.img"]


async def test_it_goes_with_no_other_disk(beside_a_disk: TargetPaths) -> None:
    """Even if everything about its file was put back but one byte of the superblock."""
    disk = beside_a_disk.data_disk
    before = disk.stat()
    with disk.open("r+b") as file:
        file.seek(66_000)
        byte = file.read(1)[0]
        file.seek(66_000)
        file.write(bytes([byte ^ 1]))
    os.utime(disk, ns=(before.st_atime_ns, before.st_mtime_ns))
    whole, told = await recalled(beside_a_disk, FACTS)
    assert (whole, told) == (False, ["changed since it was suspended: the data disk"])


async def test_damage_is_told(beside_a_disk: TargetPaths) -> None:
    with beside_a_disk.memory.open("r+b") as file:
        file.write(b"x")
    assert await recalled(beside_a_disk, FACTS) == (False, ["the saved state is damaged"])
    assert not saved_state.is_there(beside_a_disk)


async def test_who_does_not_want_it_has_it_removed(beside_a_disk: TargetPaths) -> None:
    assert await recalled(beside_a_disk, FACTS, wanted=False) == (False, [])
    assert [path.name for path in beside_a_disk.directory.iterdir()] == ["data.img"]
