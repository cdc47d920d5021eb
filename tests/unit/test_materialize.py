"""The files of a machine are whole and of the recorded version, whatever happens while they are made."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import os
import random
import resource
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from ovm.disks import copying
from ovm.disks.install import prepare
from ovm.errors import ArchiveError, FileError, SpaceError
from ovm.model.options import OriginPath, Versions
from ovm.process.threads import AHEAD_THREAD
from ovm.trust.atomic import TEMPORARY_PREFIX

NAMES = ("gvproxy", "kernel", "initrd", "rootfs")
RECORDS = ("versions.json", "digests.json")
MIB = 1 << 20


def origins(directory: Path, version: str, rootfs: bytes | None = None) -> OriginPath:
    directory.mkdir(exist_ok=True)
    for name in NAMES:
        (directory / name).write_bytes(f"{name} {version} ".encode() * 1000)
    if rootfs is not None:
        (directory / "rootfs").write_bytes(rootfs)
    return OriginPath(**{name: directory / name for name in NAMES})


def zipped(origin: OriginPath, content: bytes) -> OriginPath:
    archive = origin.rootfs.with_name("rootfs.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("any", content)
    return OriginPath(gvproxy=origin.gvproxy, kernel=origin.kernel, initrd=origin.initrd, rootfs=archive)


def all_of(version: str) -> Versions:
    return Versions(**dict.fromkeys(NAMES, version))


def contents(target: Path) -> dict[str, str]:
    """The version each target claims by its own content, which is whole."""
    found = {}
    for name in NAMES:
        words = (target / name).read_text().split()
        assert words == words[:2] * 1000
        found[name] = words[1]
    return found


def recorded(target: Path) -> dict[str, str]:
    return json.loads((target / "versions.json").read_text())


def inodes(target: Path) -> dict[str, tuple[int, int]]:
    """Which files these are: a number alone may be another file's by now, once freed."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.iterdir()}


@pytest.fixture
def one(tmp_path: Path) -> OriginPath:
    return origins(tmp_path / "one", "1")


@pytest.fixture
def two(tmp_path: Path) -> OriginPath:
    return origins(tmp_path / "two", "2")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "target"


def sparse(path: Path, size: int, data: dict[int, bytes]) -> bytes:
    with path.open("wb") as opened:
        opened.truncate(size)
        for offset, content in data.items():
            opened.seek(offset)
            opened.write(content)
    return path.read_bytes()


# --- what is made


async def test_a_first_run_makes_every_file(one, target):
    before = os.umask(0o077)
    try:
        files = await prepare(one, all_of("1"), target)
    finally:
        os.umask(before)
    assert contents(target) == recorded(target) == dict.fromkeys(NAMES, "1")
    assert (target / "versions.json").read_text() == json.dumps(dict.fromkeys(NAMES, "1"), indent=2)
    assert {path.name: path.stat().st_mode & 0o777 for path in target.iterdir()} == {
        "gvproxy": 0o755, "kernel": 0o644, "initrd": 0o644, "rootfs": 0o644,
        "versions.json": 0o644, "digests.json": 0o644
    }  # fmt: skip
    assert files.rootfs == target / "rootfs"
    assert files.vfkit is None


async def test_a_second_run_touches_nothing(one, target):
    await prepare(one, all_of("1"), target)
    before = inodes(target)
    await prepare(one, all_of("1"), target)
    assert inodes(target) == before


async def test_only_another_version_is_replaced(one, two, target):
    await prepare(one, all_of("1"), target)
    before = inodes(target)
    await prepare(two, Versions(gvproxy="1", kernel="2", initrd="1", rootfs="1"), target)
    wanted = {"gvproxy": "1", "kernel": "2", "initrd": "1", "rootfs": "1"}
    assert contents(target) == recorded(target) == wanted
    assert list(recorded(target)) == list(NAMES)
    assert {name for name, inode in inodes(target).items() if inode != before[name]} == {"kernel", *RECORDS}


async def test_force_restores_a_damaged_file_of_the_right_version(one, target):
    await prepare(one, all_of("1"), target)
    (target / "rootfs").write_bytes(b"damaged")
    await prepare(one, all_of("1"), target, force=True)
    assert contents(target) == recorded(target) == dict.fromkeys(NAMES, "1")


@pytest.mark.parametrize("record", [None, b"{", b'{"kernel": 1}', b"\0"])
async def test_without_a_usable_record_all_are_replaced(one, two, target, record):
    await prepare(one, all_of("1"), target)
    (target / "versions.json").unlink()
    if record is not None:
        (target / "versions.json").write_bytes(record)
    await prepare(two, all_of("1"), target)
    assert contents(target) == dict.fromkeys(NAMES, "2")
    assert recorded(target) == dict.fromkeys(NAMES, "1")


async def test_missing_empty_or_linked_targets_are_made_again(one, target, tmp_path):
    await prepare(one, all_of("1"), target)
    (target / "kernel").unlink()
    (target / "initrd").write_bytes(b"")
    (target / "rootfs").unlink()
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    (target / "rootfs").symlink_to(tmp_path / "elsewhere")
    await prepare(one, all_of("1"), target)
    assert contents(target) == dict.fromkeys(NAMES, "1")
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"


async def test_records_of_other_files_are_kept(one, target):
    target.mkdir(parents=True)
    (target / "versions.json").write_text('{"vfkit": "9"}')
    await prepare(one, all_of("1"), target)
    assert recorded(target) == {**dict.fromkeys(NAMES, "1"), "vfkit": "9"}


async def test_what_a_dead_run_left_is_removed_and_nothing_else(one, target):
    target.mkdir(parents=True)
    (target / (TEMPORARY_PREFIX + "rootfs")).write_bytes(b"half")
    (target / (TEMPORARY_PREFIX + "of an older ovm")).write_bytes(b"half")
    (target / "data.img").write_bytes(b"precious")
    await prepare(one, all_of("1"), target)
    assert {path.name for path in target.iterdir()} == {*NAMES, *RECORDS, "data.img"}


async def test_progress_is_told_in_the_loop_and_ends_at_the_whole(one, target):
    told: list[tuple[str, int, int]] = []

    def progress(name: str, done: int, total: int) -> None:
        asyncio.get_running_loop()
        told.append((name, done, total))

    await prepare(one, all_of("1"), target, progress=progress)
    for name in NAMES:
        of_file = [(done, total) for n, done, total in told if n == name]
        assert of_file == sorted(of_file)
        assert of_file[-1] == (getattr(one, name).stat().st_size,) * 2


# --- holes


async def test_a_sparse_file_stays_sparse(one, target):
    content = sparse(one.rootfs, 16 * MIB, {0: b"a" * 5000, 5 * MIB + 1: b"b" * 9000, 9 * MIB: b"c"})
    await prepare(one, all_of("1"), target)
    made = target / "rootfs"
    assert made.read_bytes() == content
    assert made.stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("tail", [b"", b"end", bytes(100), b"x" * 4096], ids=["none", "part", "zeros", "block"])
async def test_zeros_of_an_archive_become_holes(one, target, tail):
    content = b"a" * 5000 + bytes(5 * MIB) + b"b" * 70_000 + bytes(3 * MIB) + tail
    files = await prepare(zipped(one, content), all_of("1"), target)
    assert files.rootfs == target / "rootfs"
    assert files.rootfs.read_bytes() == content
    assert files.rootfs.stat().st_blocks * 512 < MIB


def test_runs_of_data_are_the_same_however_the_pieces_are_cut():
    rng = random.Random(7)
    content = b"".join(rng.choice([bytes(4096), b"d" * 4096, bytes(3000)]) for _ in range(200))
    for size in (1000, 4096, 5000, len(content)):
        pieces = [content[at : at + size] for at in range(0, len(content), size)]
        made = bytearray(len(content))
        for offset, data in copying.data_runs(pieces):
            made[offset : offset + len(data)] = data
        assert made == content


async def test_an_empty_tail_and_no_hole_at_all_are_copied_too(one, target, monkeypatch):
    """A file system without SEEK_DATA, and a kernel that copies nothing by itself."""
    monkeypatch.delattr(os, "SEEK_DATA")
    monkeypatch.setattr(os, "SEEK_DATA", 99, raising=False)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0, raising=False)
    content = sparse(one.rootfs, 3 * MIB, {MIB: os.urandom(5000)})
    await prepare(one, all_of("1"), target)
    assert (target / "rootfs").read_bytes() == content


# --- packed kernels


def with_kernel(origin: OriginPath, name: str, content: bytes) -> OriginPath:
    path = origin.kernel.with_name(name)
    path.write_bytes(content)
    return OriginPath(gvproxy=origin.gvproxy, kernel=path, initrd=origin.initrd, rootfs=origin.rootfs)


IMAGE = b"MZ" + bytes(54) + b"ARM\x64" + os.urandom(100_000) + bytes(3 * MIB) + b"end"


async def test_a_packed_kernel_is_unpacked(one, target):
    packed = with_kernel(one, "vmlinuz.gz", gzip.compress(IMAGE))
    told: list[tuple[int, int]] = []
    files = await prepare(
        packed, all_of("1"), target, progress=lambda name, *sizes: told.append(sizes) if name == "kernel" else None
    )
    assert files.kernel == target / "vmlinuz"
    assert files.kernel.read_bytes() == IMAGE
    assert files.kernel.stat().st_mode & 0o777 == 0o644
    assert files.kernel.stat().st_blocks * 512 < MIB
    assert told[-1] == (len(IMAGE), len(IMAGE))
    assert {path.name for path in target.iterdir()} == {"gvproxy", "vmlinuz", "initrd", "rootfs", *RECORDS}
    before = inodes(target)
    await prepare(packed, all_of("1"), target)
    assert inodes(target) == before


async def test_only_a_kernel_is_unpacked(one, target):
    """The guest's kernel unpacks its initrd itself."""
    one.initrd.write_bytes(gzip.compress(IMAGE))
    files = await prepare(one, all_of("1"), target)
    assert files.initrd.read_bytes() == one.initrd.read_bytes()


async def test_a_damaged_kernel_replaces_nothing(one, two, target):
    await prepare(one, all_of("1"), target)
    for damaged in (gzip.compress(IMAGE)[:-10], gzip.compress(IMAGE)[:-8] + bytes(8)):
        with pytest.raises(FileError, match=r"the kernel in .*vmlinuz (is truncated|cannot be unpacked)"):
            await prepare(with_kernel(two, "vmlinuz", damaged), all_of("2"), target)
        untouched(target, "1")


async def test_the_room_for_an_unpacked_kernel_is_known(one, two, target, monkeypatch):
    """It is what is in it that counts: a few packed kilobytes may need megabytes, and its holes need nothing."""
    await prepare(one, all_of("1"), target)
    monkeypatch.setattr(copying, "clone", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_frsize=MIB, f_bavail=2))
    with pytest.raises(SpaceError, match=r"need 5 MiB in .*, 2 MiB are available"):
        await prepare(with_kernel(two, "vmlinuz", gzip.compress(b"x" * 4 * MIB)), all_of("2"), target)
    untouched(target, "1")
    await prepare(with_kernel(two, "vmlinuz", gzip.compress(b"x" + bytes(8 * MIB))), all_of("2"), target)


# --- what goes wrong


def untouched(target: Path, version: str) -> None:
    assert contents(target) == recorded(target) == dict.fromkeys(NAMES, version)
    assert not list(target.glob(TEMPORARY_PREFIX + "*"))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"other"),
        lambda path: os.truncate(path, 10),
        lambda path: os.utime(path, (1, 1)),
        lambda path: path.unlink(),
        lambda path: (path.rename(path.with_name("old")), path.write_bytes(path.with_name("old").read_bytes())),
    ],
    ids=["rewritten", "cut", "newer", "removed", "exchanged"],
)
async def test_an_origin_that_changes_under_the_copy_replaces_nothing(one, two, target, monkeypatch, change):
    await prepare(one, all_of("1"), target)
    whole_copy = copying.copy

    def copy(source, *rest):
        if os.fstat(source).st_ino == inode:
            change(two.kernel)
        yield from whole_copy(source, *rest)

    inode = two.kernel.stat().st_ino
    monkeypatch.setattr(copying, "clone", lambda *_: False)
    monkeypatch.setattr(copying, "copy", copy)
    with pytest.raises(FileError, match="kernel changed during the copy"):
        await prepare(two, all_of("2"), target)
    untouched(target, "1")


async def test_a_damaged_archive_replaces_nothing(one, two, target):
    await prepare(one, all_of("1"), target)
    damaged = zipped(two, os.urandom(100_000))
    with damaged.rootfs.open("r+b") as opened:
        opened.seek(50_000)
        opened.write(b"damage")
    with pytest.raises(ArchiveError, match=r"rootfs\.zip"):
        await prepare(damaged, all_of("2"), target)
    untouched(target, "1")


async def test_a_missing_origin_is_an_error_of_ours(one, target):
    one.initrd.unlink()
    with pytest.raises(FileError, match=r"initrd cannot be copied to .*: No such file"):
        await prepare(one, all_of("1"), target)
    assert list(target.iterdir()) == []


async def test_a_directory_in_a_files_place_is_named(one, target):
    (target / "kernel").mkdir(parents=True)
    with pytest.raises(FileError, match="is a directory where kernel belongs"):
        await prepare(one, all_of("1"), target)


async def test_a_file_in_the_target_directorys_place_is_named(one, target):
    target.parent.mkdir()
    target.write_bytes(b"")
    with pytest.raises(FileError, match="target cannot be used: File exists"):
        await prepare(one, all_of("1"), target)


@pytest.mark.parametrize("cancels", [1, 3])
async def test_a_cancelled_copy_leaves_nothing_and_no_thread(one, two, target, monkeypatch, cancels):
    await prepare(one, all_of("1"), target)
    copying_now, ended = asyncio.Event(), []

    def endless(*_):
        try:
            while True:
                yield 0
        finally:
            ended.append(True)

    monkeypatch.setattr(copying, "clone", lambda *_: False)
    monkeypatch.setattr(copying, "copy", endless)
    running = asyncio.create_task(prepare(two, all_of("2"), target, progress=lambda *_: copying_now.set()))
    await copying_now.wait()
    for _ in range(cancels):
        running.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended
    untouched(target, "1")


async def test_a_cancelled_unpacking_leaves_nothing_and_no_thread(one, two, target):
    await prepare(one, all_of("1"), target)
    unpacking, packed = asyncio.Event(), zipped(two, os.urandom(8 * MIB) + bytes(256 * MIB))
    running = asyncio.create_task(prepare(packed, all_of("2"), target, progress=lambda *_: unpacking.set()))
    await unpacking.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    untouched(target, "1")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(AHEAD_THREAD)]


async def test_no_thread_lives_as_long_as_the_error_of_a_disk(one, two, target, monkeypatch):
    """Whoever keeps the error keeps its frames, and with them the generators; not the thread that unpacks."""
    await prepare(one, all_of("1"), target)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copying, "write_at", full)
    with pytest.raises(SpaceError) as kept:
        await prepare(zipped(two, os.urandom(16 * MIB)), all_of("2"), target)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(AHEAD_THREAD)]
    assert kept.value.__cause__ is not None
    untouched(target, "1")


# --- room


async def test_too_little_room_is_known_before_the_first_byte(one, two, target, monkeypatch):
    await prepare(one, all_of("1"), target)
    sparse(two.rootfs, 8 * MIB, {3 * MIB: b"x" * 3 * MIB})
    monkeypatch.setattr(copying, "clone", lambda *_: False)
    monkeypatch.setattr(copying, "copy", lambda *_: pytest.fail("a byte was copied"))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_frsize=MIB, f_bavail=2))
    with pytest.raises(SpaceError, match=r"need 4 MiB in .*, 2 MiB are available"):
        await prepare(two, all_of("2"), target)
    untouched(target, "1")


async def test_holes_need_no_room(one, target, monkeypatch):
    monkeypatch.setattr(copying, "clone", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_frsize=MIB, f_bavail=1))
    sparse(one.rootfs, 8 * MIB, {3 * MIB: b"x" * 5000})
    await prepare(one, all_of("1"), target)
    await prepare(zipped(one, b"x" + bytes(5 * MIB)), all_of("2"), target)
    with pytest.raises(SpaceError, match="need 2 MiB"):
        await prepare(zipped(one, os.urandom(MIB + 1) + bytes(5 * MIB)), all_of("3"), target)


async def test_a_file_too_large_for_its_file_system_leaves_nothing(one, two, target):
    await prepare(one, all_of("1"), target)
    two.rootfs.write_bytes(b"x" * MIB)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, before[1]))
    try:
        with pytest.raises(SpaceError, match=r"rootfs cannot be copied to .*: File too large"):
            await prepare(two, all_of("2"), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    untouched(target, "1")


def mounted(where: Path, *arguments: str) -> Path:
    where.mkdir()
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    mount = subprocess.run(["mount", *arguments, where], capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"this host cannot mount {arguments}: {mount.stderr.strip()}")
    return where


@pytest.fixture
def tiny_disk(tmp_path):
    yield mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "tmpfs")
    subprocess.run(["umount", tmp_path / "disk"], check=True)


async def test_a_disk_that_fills_up_meanwhile_leaves_nothing(one, two, tiny_disk, monkeypatch):
    target = tiny_disk / "target"
    await prepare(one, all_of("1"), target)
    two.rootfs.write_bytes(b"x" * MIB)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_frsize=MIB, f_bavail=9))
    with pytest.raises(SpaceError, match=r"cannot be copied to .*: No space left"):
        await prepare(two, all_of("2"), target)
    untouched(target, "1")


@pytest.fixture(scope="module")
def btrfs(tmp_path_factory):
    base = tmp_path_factory.mktemp("btrfs")
    with (base / "image").open("wb") as image:
        image.truncate(128 * MIB)
    try:
        subprocess.run(["mkfs.btrfs", "-q", base / "image"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this host cannot make a btrfs")
    yield mounted(base / "disk", "-o", "loop", os.fspath(base / "image"))
    subprocess.run(["umount", base / "disk"], check=True)


async def test_where_blocks_can_be_shared_no_room_is_needed(btrfs, monkeypatch):
    one = origins(btrfs / "one", "1", os.urandom(MIB))
    monkeypatch.setattr(copying, "copy", lambda *_: pytest.fail("a byte was copied"))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_frsize=MIB, f_bavail=0))
    files = await prepare(one, all_of("1"), btrfs / "target")
    assert files.rootfs.read_bytes() == one.rootfs.read_bytes()
    assert files.gvproxy.stat().st_mode & 0o777 == 0o755
