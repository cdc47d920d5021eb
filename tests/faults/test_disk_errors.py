"""A disk that is full, cannot be read, or fails in any other way, and an origin that does not hold still.

After each the error is of a kind of ours, nothing is replaced by half, and the next create works.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import filesystems
import soak
from crashes import look
from ovm.disks import copying, data, verify
from ovm.disks.install import prepare
from ovm.errors import ArchiveError, FileError, SpaceError
from ovm.model.options import OriginPath, Versions
from ovm.paths import TargetPaths
from ovm.trust.atomic import TEMPORARY_PREFIX

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems of Linux")

NAMES = ("gvproxy", "kernel", "initrd", "rootfs")
MIB = 1 << 20
PAGE = 4096
BLOCK = 1024


def content(name: str, version: str) -> bytes:
    return (f"{name} {version} ".encode() * 2000)[: 9000 + len(name)]


def all_of(version: str) -> Versions:
    return Versions(**dict.fromkeys(NAMES, version))


@pytest.fixture
def origins(tmp_path: Path) -> dict[str, OriginPath]:
    """Of two versions; the rootfs of the second one is packed."""
    for version in "12":
        (tmp_path / version).mkdir()
        for name in NAMES:
            (tmp_path / version / name).write_bytes(content(name, version))
    with zipfile.ZipFile(tmp_path / "2" / "rootfs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rootfs", content("rootfs", "2"))
    one = OriginPath(**{name: tmp_path / "1" / name for name in NAMES})
    two = {name: tmp_path / "2" / name for name in NAMES} | {"rootfs": tmp_path / "2" / "rootfs.zip"}
    return {"1": one, "2": OriginPath(**two)}


async def assert_complete(target: Path, version: str) -> None:
    assert json.loads((target / "versions.json").read_text()) == dict.fromkeys(NAMES, version)
    for name in NAMES:
        assert (target / name).read_bytes() == content(name, version)
    assert {file.state for file in await verify.verify(target)} == {"ok"}
    assert not list(target.glob(TEMPORARY_PREFIX + "*"))


def assert_true(target: Path) -> None:
    """What is recorded is whole."""
    for name, version in json.loads((target / "versions.json").read_text()).items():
        assert (target / name).read_bytes() == content(name, version)


# --- a full disk


def fill(directory: Path, kind: str, left: int) -> None:
    """Leave room for ``left`` KiB, or for as many files."""
    if kind == "inodes":
        for number in range(os.statvfs(directory).f_ffree - left):
            (directory / f"filler{number}").touch()
        return
    with (directory / "filler").open("wb") as filler:
        for step in (64 * PAGE, PAGE, BLOCK):
            with contextlib.suppress(OSError):
                while True:
                    size = os.fstat(filler.fileno()).st_size
                    os.posix_fallocate(filler.fileno(), size, step)
        filler.truncate(size - left * BLOCK)


def empty_again(directory: Path) -> None:
    for filler in directory.glob("filler*"):
        filler.unlink()


@pytest.fixture(params=["blocks", "inodes", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A small file system, and what it will be short of."""
    if request.param == "ext4":
        image = filesystems.make("ext4", tmp_path / "image", 2 * MIB)
        mounted = filesystems.mounted("ext4", tmp_path / "disk", "-o", "loop", source=os.fspath(image))
    else:
        room = "size=512k,nr_inodes=1000" if request.param == "blocks" else "size=4m,nr_inodes=40"
        mounted = filesystems.mounted("tmpfs", tmp_path / "disk", "-o", room)
    with mounted as where:
        yield where, request.param


@pytest.mark.parametrize("force", [False, True], ids=["upgrade", "reset"])
async def test_a_disk_that_is_full_at_any_point_leaves_all_as_it_was(small_disk, origins, monkeypatch, force):
    """However many blocks or files there is room for: too few, and nothing has changed; or enough."""
    disk, kind = small_disk
    target = disk / "target"
    await prepare(origins["1"], all_of("1"), target)
    await data.ensure_data_disk(TargetPaths(target), 1)
    monkeypatch.setattr(copying, "clone", lambda *_: False)
    with monkeypatch.context() as blind:  # it is told to be empty, and found to be full in the midst of writing
        blind.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_frsize=MIB, f_bavail=9))
        failed = 0
        for left in range(100) if kind == "inodes" else range(0, 100, 4 if kind == "blocks" else 1):
            blind.undo()
            fill(disk, kind, left)
            before = look(target)
            blind.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_frsize=MIB, f_bavail=9))
            try:
                await prepare(origins["2"], all_of("2"), target, force=force)
            except SpaceError:
                failed += 1
                after = look(target)
                if force:  # has forgotten what it was not to trust
                    assert_true(target)
                    before.pop("versions.json"), after.pop("versions.json")
                assert after == before
            else:
                break
            finally:
                empty_again(disk)
        assert failed > 5
    await assert_complete(target, "2")
    await prepare(origins["1"], all_of("1"), target)
    await assert_complete(target, "1")


async def test_a_first_create_on_a_full_disk_leaves_nothing(small_disk, origins, monkeypatch):
    """A first create() on a full disk fails and leaves no file."""
    disk, kind = small_disk
    target = disk / "target"
    target.mkdir()
    fill(disk, kind, 3)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=9, f_frsize=MIB, f_bavail=9))
    with pytest.raises(SpaceError):
        await prepare(origins["1"], all_of("1"), target)
    assert list(target.iterdir()) == []
    empty_again(disk)
    await prepare(origins["1"], all_of("1"), target)
    await assert_complete(target, "1")


async def test_a_full_disk_names_what_is_needed_before_the_first_byte(small_disk, origins):
    """A disk that is too small is refused before the first byte, and the error names the bytes needed."""
    disk, kind = small_disk
    if kind == "inodes":
        pytest.skip("no file system tells how many blocks its files will need")
    target = disk / "target"
    await prepare(origins["1"], all_of("1"), target)
    fill(disk, kind, 3)
    before = look(target)
    with pytest.raises(SpaceError, match=r"gvproxy, kernel, initrd, rootfs need 1 MiB in .*, 0 MiB are available"):
        await prepare(origins["2"], all_of("2"), target)
    assert look(target) == before


async def test_no_room_for_a_new_data_disk_is_no_data_disk(small_disk, origins):
    """Its record is written first, so there is never a disk without one."""
    disk, kind = small_disk
    target = TargetPaths(disk / "target")
    await prepare(origins["1"], all_of("1"), target.directory)
    fill(disk, kind, 0)
    with pytest.raises(SpaceError):
        await data.ensure_data_disk(target, 1)
    assert not target.data_disk.exists()
    assert not list(target.directory.glob(TEMPORARY_PREFIX + "*"))
    empty_again(disk)
    assert (await data.ensure_data_disk(target, 1)).created


# --- a disk that fails


@pytest.fixture(params=["rootfs", "rootfs.zip"])
def unreadable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An origin of 10 MiB on a disk that ends in the midst of it."""
    image = filesystems.make("ext4", tmp_path / "image", 32 * MIB)
    where, source, noise = tmp_path / "damaged", os.fspath(image), random.Random(1).randbytes(10 * MIB)
    path = where / request.param
    with filesystems.mounted("ext4", where, "-o", "loop", source=source):
        if path.suffix:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("rootfs", noise)
        else:
            path.write_bytes(noise)
    with filesystems.mounted("ext4", where, "-o", "loop,ro", source=source):
        os.truncate(image, 12 * MIB)  # a loop device answers with an error behind the end of its file
        with pytest.raises(OSError, match="Input/output error"):
            path.read_bytes()
        yield path


async def test_an_origin_that_cannot_be_read_replaces_nothing(unreadable, origins, tmp_path):
    """An origin that cannot be read replaces no file."""
    target = tmp_path / "target"
    await prepare(origins["1"], all_of("1"), target)
    before = look(target)
    one = origins["1"]
    damaged = OriginPath(gvproxy=one.gvproxy, kernel=one.kernel, initrd=one.initrd, rootfs=unreadable)
    with pytest.raises((FileError, ArchiveError), match=r"rootfs.* (cannot be|be copied).*: Input/output error"):
        await prepare(damaged, all_of("2"), target)
    assert look(target) == before
    await prepare(origins["2"], all_of("2"), target)
    await assert_complete(target, "2")


@pytest.fixture
def ram() -> Iterator[Path]:
    """A directory where flushes take no time."""
    with tempfile.TemporaryDirectory(prefix="ovm-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as made:
        yield Path(made)


CALLS = ("open", "fsync", "replace", "unlink", "pwrite", "pread", "copy_file_range", "ftruncate", "fchmod", "fstat")


class _Failing:
    """Lets the call of that number fail; counts them all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, below: Path, number: int, code: int) -> None:
        self.number, self.code, self.calls, self.failed = number, code, 0, ""
        self._lock, self._below = threading.Lock(), os.fspath(below)
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name, real):
        def call(*args, **more):
            with self._lock:
                self.calls += 1
                fails = self.calls == self.number
            if fails:
                self.failed = f"{name}{args}"
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **more)

        return call


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("force", [False, True], ids=["upgrade", "reset"])
async def test_whichever_call_fails_the_error_is_ours_and_the_next_create_works(origins, ram, code, force):
    """Each call that is made to the operating system, one after the other."""
    target = ram / "target"
    await prepare(origins["1"], all_of("1"), target)
    await data.ensure_data_disk(TargetPaths(target), 1)
    before_all = descriptors()
    version, number, errors = "1", 0, 0
    while True:
        number += 1
        wanted = "2" if version == "1" else "1"
        before = look(target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copying, "clone", lambda *_: False)
            failing = _Failing(patch, target, number, code)
            try:
                await prepare(origins[wanted], all_of(wanted), target, force=force)
                await data.ensure_data_disk(TargetPaths(target), 1)
            except (FileError, ArchiveError, SpaceError):
                errors += 1
            except Exception as error:
                raise AssertionError(f"{failing.failed} failed as {error!r}") from error
        assert_true(target)
        assert data.load_machine(TargetPaths(target)).machine_id in before["machine.json"][0].decode()
        assert descriptors() == before_all, f"{failing.failed} leaves a file open"
        await prepare(origins[wanted], all_of(wanted), target)
        await assert_complete(target, wanted)
        version = wanted
        if failing.calls < number:
            break
    assert errors > 30


# --- an origin that does not hold still


@pytest.mark.parametrize("how", ["grown", "in place", "replaced"])
async def test_an_origin_that_is_written_all_the_time_is_copied_whole_or_not_at_all(origins, tmp_path, how):
    """Another thread does so; no result is a mixture."""
    source = origins["1"].rootfs
    size = 4 * MIB
    whole = [bytes([number]) * size for number in (1, 2)]
    source.write_bytes(whole[0])
    stop = threading.Event()

    def write() -> None:
        rng = soak.random(how)
        while not stop.is_set():
            new = rng.choice(whole)
            if how == "replaced":
                beside = source.with_name("beside")
                beside.write_bytes(new)
                beside.replace(source)
            elif how == "in place":
                with source.open("r+b") as opened:
                    opened.write(new)
            else:
                with source.open("ab") as opened:
                    opened.write(b"\1" * PAGE)
            stop.wait(rng.choice([0, 0.002, 0.02]))

    target = tmp_path / "target"
    writer = threading.Thread(target=write)
    writer.start()
    refused = made = 0
    try:
        for number in range(30):
            try:
                files = await prepare(origins["1"], all_of(str(number)), target)
            except FileError:
                refused += 1
            else:
                made += 1
                found = files.rootfs.read_bytes()
                assert len(set(found)) == 1
                assert len(found) >= size
                assert {file.state for file in await verify.verify(target)} == {"ok"}
    finally:
        stop.set()
        writer.join()
    await prepare(origins["1"], all_of("last"), target)
    assert (target / "rootfs").read_bytes() == source.read_bytes()
    assert refused + made == 30
    assert refused
