"""The data disk is never replaced, never shrunk, and never offered for formatting once it was in use."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovm.disks import data
from ovm.disks.data import DataDisk, Machine, ensure_data_disk, load_machine, remove_data, save_machine
from ovm.errors import FileError, SpaceError
from ovm.paths import TargetPaths

MIB = 1 << 20


@pytest.fixture
def target(tmp_path: Path) -> TargetPaths:
    return TargetPaths(tmp_path / "target")


async def used(target: TargetPaths) -> Machine:
    """A machine whose guest has been ready and has written to its disk."""
    await ensure_data_disk(target, 16)
    with target.data_disk.open("r+b") as disk:
        disk.seek(MIB)
        disk.write(b"precious")
    machine = msgspec.structs.replace(load_machine(target), data_ever_ready=True)
    save_machine(target, machine)
    return machine


def precious(target: TargetPaths) -> bool:
    return b"precious" in target.data_disk.read_bytes()


async def test_a_new_disk_is_sparse_private_and_may_be_formatted(target):
    assert await ensure_data_disk(target, 64 * 1024) == DataDisk(64 * 1024 * MIB, created=True)
    status = target.data_disk.stat()
    assert status.st_size == 64 * 1024 * MIB
    assert status.st_blocks * 512 < MIB
    assert status.st_mode & 0o777 == target.machine.stat().st_mode & 0o777 == 0o600
    assert not load_machine(target).data_ever_ready
    assert {path.name for path in target.directory.iterdir()} == {"data.img", "machine.json"}


async def test_a_disk_grows_and_keeps_what_it_holds(target):
    machine, inode = await used(target), target.data_disk.stat().st_ino
    assert await ensure_data_disk(target, 32) == DataDisk(32 * MIB, grown=True)
    assert target.data_disk.stat().st_size == load_machine(target).data_device_size == 32 * MIB
    assert target.data_disk.stat().st_ino == inode
    assert precious(target)
    assert load_machine(target) == msgspec.structs.replace(machine, data_device_size=32 * MIB)


async def test_a_smaller_wish_is_answered_with_the_real_size(target):
    await used(target)
    assert await ensure_data_disk(target, 8) == DataDisk(16 * MIB)
    assert target.data_disk.stat().st_size == 16 * MIB


async def test_a_disk_that_was_cut_is_refused(target):
    await used(target)
    os.truncate(target.data_disk, 2 * MIB)
    with pytest.raises(FileError, match=r"data\.img was truncated from 16777216 to 2097152 bytes"):
        await ensure_data_disk(target, 32)
    assert target.data_disk.stat().st_size == 2 * MIB


async def test_a_disk_that_somebody_removed_is_made_empty_and_may_be_formatted(target):
    machine = await used(target)
    target.data_disk.unlink()
    assert (await ensure_data_disk(target, 16)).created
    assert load_machine(target) == msgspec.structs.replace(machine, data_ever_ready=False)


async def test_a_disk_may_be_a_link_to_another_place(target, tmp_path):
    target.directory.mkdir()
    (tmp_path / "big").touch()
    target.data_disk.symlink_to(tmp_path / "big")
    assert await ensure_data_disk(target, 16) == DataDisk(16 * MIB, grown=True)
    assert (tmp_path / "big").stat().st_size == 16 * MIB
    (tmp_path / "big").unlink()
    with pytest.raises(FileError, match=r"data\.img cannot be used: No such file"):
        await ensure_data_disk(target, 16)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
async def test_a_disk_must_be_a_file(target, make):
    target.directory.mkdir()
    make(target.data_disk)
    with pytest.raises(FileError, match="is not a regular file"):
        await ensure_data_disk(target, 16)


async def test_a_size_the_file_system_cannot_hold_is_named(target):
    with pytest.raises(SpaceError, match=r"data\.img cannot be used: File too large"):
        await ensure_data_disk(target, 1 << 42)


# --- the record


async def test_a_machine_keeps_its_identity(target):
    await ensure_data_disk(target, 16)
    first = load_machine(target)
    await ensure_data_disk(target, 16)
    assert load_machine(target) == first
    assert len(first.machine_id) == 32


def test_looking_at_a_machine_writes_nothing(target):
    assert load_machine(target).data_ever_ready is False
    assert not target.directory.exists()


DAMAGED = [
    b"",
    b"\0" * 64,
    b"{",
    b"[" * 100_000,
    b"null",
    b"{}",
    b'{"machine_id": "short"}',
    b'{"machine_id": "' + b"0" * 32 + b'\\n", "data_ever_ready": false}',
    b'{"machine_id": "' + b"0" * 32 + b'", "data_ever_ready": 0}',
    b'{"machine_id": "' + b"0" * 32 + b'", "data_device_size": -1}',
]


@pytest.mark.parametrize("content", [*DAMAGED, None])
async def test_without_a_usable_record_a_disk_with_content_counts_as_used(target, content):
    await used(target)
    target.machine.unlink()
    if content is not None:
        target.machine.write_bytes(content)
    assert load_machine(target).data_ever_ready
    await ensure_data_disk(target, 16)
    assert load_machine(target) == load_machine(target)
    assert load_machine(target).data_ever_ready
    assert precious(target)


async def test_without_a_usable_record_an_empty_disk_may_be_formatted(target):
    await ensure_data_disk(target, 16)
    target.machine.write_bytes(b"{")
    assert not load_machine(target).data_ever_ready


async def test_a_disk_that_cannot_be_looked_at_counts_as_used(target):
    target.directory.mkdir()
    target.data_disk.symlink_to(target.data_disk.name)
    assert load_machine(target).data_ever_ready


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary())
def test_no_record_can_raise(target, content):
    target.directory.mkdir(exist_ok=True)
    target.machine.write_bytes(content)
    assert len(load_machine(target).machine_id) == 32


def test_a_record_of_a_later_version_is_understood(target):
    target.directory.mkdir()
    target.machine.write_bytes(b'{"machine_id": "' + b"a" * 32 + b'", "data_ever_ready": true, "more": [1]}')
    assert load_machine(target) == Machine(machine_id="a" * 32, data_ever_ready=True)


# --- removal


async def test_a_removed_disk_comes_back_empty_and_the_machine_is_the_same(target):
    machine = await used(target)
    await remove_data(target)
    assert not target.data_disk.exists()
    assert load_machine(target) == Machine(machine_id=machine.machine_id)
    assert (await ensure_data_disk(target, 8)).size_bytes == 8 * MIB
    assert not precious(target)


async def test_removing_nothing_is_no_error(target):
    await remove_data(target)
    assert not target.directory.exists()


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("work", ["remove", "recreate"])
@pytest.mark.parametrize("before_write", [True, False])
async def test_no_instant_allows_formatting_a_used_disk(target, monkeypatch, work, before_write):
    await used(target)
    if work == "recreate":
        target.data_disk.unlink()
    write = data.save_machine

    def cut_off(*given_):
        if not before_write:
            write(*given_)
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(data, "save_machine", cut_off)
        with pytest.raises(PowerCutError):
            await (remove_data(target) if work == "remove" else ensure_data_disk(target, 16))
    assert not target.data_disk.exists()
    await ensure_data_disk(target, 16)
    assert not load_machine(target).data_ever_ready


async def test_a_disk_that_cannot_be_removed_keeps_its_record(target):
    machine = await used(target)
    target.data_disk.unlink()
    target.data_disk.mkdir()
    with pytest.raises(FileError, match=r"data\.img cannot be removed"):
        await remove_data(target)
    assert load_machine(target) == machine
