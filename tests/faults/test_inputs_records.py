"""Generated records: what ovm or others have written before is read to a result or an error of ours, or ignored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
import releases
from ovm import paths
from ovm.disks import data, install, records
from ovm.errors import FileError, ImageError, InUseError
from ovm.image import images, index
from ovm.model.options import OriginPath, Versions
from ovm.paths import LOCK, TargetPaths
from ovm.process import identity, lock, orphans
from ovm.registry import images as registry
from ovm.registry import machines

VERSIONS = {"gvproxy": "1", "kernel": "1", "initrd": "1", "rootfs": "1"}
MACHINES = [
    {"machine_id": "0" * 32, "data_ever_ready": True, "data_device_size": 1 << 20},
    {"machine_id": "a" * 32, "data_ever_ready": False, "data_device_size": 0},
]
DATA = b"what people keep"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> OriginPath:
    directory = tmp_path_factory.mktemp("origin")
    files = {name: directory / name for name in VERSIONS}
    for name, path in files.items():
        path.write_bytes(name.encode() * 512)
    return OriginPath(**files)


@pytest.fixture(scope="module")
def made(origin: OriginPath, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target directory with everything in it."""
    target = tmp_path_factory.mktemp("made")
    asyncio.run(install.prepare(origin, Versions(**VERSIONS), target))
    return target


@pytest.fixture
def target(made: Path, tmp_path: Path) -> TargetPaths:
    shutil.copytree(made, tmp_path / "target")
    return TargetPaths(tmp_path / "target")


DIGEST = "0" * 64
MADE = {name: {"file": name, "version": "1", "size": 1, "digest": DIGEST} for name in VERSIONS}


@fuzz.examples(1000)
@given(versions=fuzz.documents(VERSIONS), digests=fuzz.documents(MADE), other=st.booleans())
async def test_whatever_the_records_say_every_file_is_whole(
    origin: OriginPath, target: TargetPaths, versions: bytes, digests: bytes, other: bool
) -> None:
    """versions.json and digests.json decide what is made anew, and nothing else: what is there in the end is whole."""
    target.versions.write_bytes(versions)
    target.digests.write_bytes(digests)
    target.data_disk.write_bytes(DATA)
    wanted = Versions(**(VERSIONS | {"kernel": "2"} if other else VERSIONS))
    await install.prepare(origin, wanted, target.directory)
    found = records.load(target)
    for name, path in origin.named().items():
        assert (target.directory / name).read_bytes() == path.read_bytes()
        assert found.versions[name] == getattr(wanted, name)
        if name in found.made:
            assert found.made[name].version == getattr(wanted, name)
    assert target.data_disk.read_bytes() == DATA
    assert not list(target.directory.glob(".ovm-new*"))


@fuzz.examples(1000)
@given(content=fuzz.documents(*MACHINES), disk=st.sampled_from([None, b"", DATA * 64]))
async def test_whatever_machine_json_says_no_used_disk_is_formatted(
    tmp_path: Path, content: bytes, disk: bytes | None
) -> None:
    """The disk is as it was or grown, and refused or remembered; a record that is not understood allows nothing."""
    target = TargetPaths(tmp_path)
    target.machine.write_bytes(content)
    target.data_disk.unlink(missing_ok=True)
    if disk is not None:
        target.data_disk.write_bytes(disk)
    understood = _machine(content)
    before = fuzz.snapshot(tmp_path)
    try:
        await data.ensure_data_disk(target, 1)
    except FileError:
        assert fuzz.snapshot(tmp_path) == before
        return
    machine = data.load_machine(target)
    assert target.data_disk.read_bytes().startswith(disk or b"")
    assert target.data_disk.stat().st_size >= 1 << 20
    if disk is None:
        assert not machine.data_ever_ready
    elif understood is not None:
        assert machine.data_ever_ready == understood.data_ever_ready
    elif disk:
        assert machine.data_ever_ready


def _machine(content: bytes) -> data.Machine | None:
    """What the record says to somebody who is stricter than need be."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        told = json.loads(content.decode())
        if set(told) >= {"machine_id"} and len(told["machine_id"]) == 32:
            import msgspec

            return msgspec.json.decode(content, type=data.Machine)
    return None


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases.make_image(tmp_path_factory.mktemp("image") / "image", rootfs=b"rootfs" * 100)


@pytest.fixture(scope="module")
def described(image: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((image / "image.json").read_text())
    return found


@fuzz.examples(3000)
@given(data=st.data())
async def test_whatever_image_json_says(image: Path, described: dict[str, object], data: st.DataObject) -> None:
    """An image, or an ImageError, from everybody who reads it; nothing is touched, nor removed unless it is one."""
    (image / "image.json").write_bytes(data.draw(fuzz.documents(described)))
    with fuzz.unchanged(image):
        for read in (registry.load_image, images.load_image):
            with contextlib.suppress(ImageError):
                assert read(image).path("kernel") == image / "kernel"
        assert {found.directory for found in images.list_images(image.parent)} <= {image}
        with contextlib.suppress(ImageError):
            await images.verify_image(image)
    try:
        with fuzz.unchanged(image):
            copy = image.parent.parent / "removed"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(image, copy)
        before = fuzz.snapshot(copy)
        images.remove_image(copy)
    except ImageError:
        assert fuzz.snapshot(copy) == before
    else:
        assert not copy.exists()


@pytest.mark.parametrize(
    "read", [registry.load_image, images.load_image, images.remove_image], ids=lambda f: f.__module__
)
@pytest.mark.parametrize("kind", ["directory", "fifo", "link to nothing", "link to itself", "unreadable name"])
def test_image_json_may_be_anything(tmp_path: Path, read: object, kind: str) -> None:
    """Not even a regular file; nobody waits for whoever would write into a fifo."""
    description = tmp_path / "image.json"
    match kind:
        case "directory":
            description.mkdir()
        case "fifo":
            os.mkfifo(description)
        case "link to nothing":
            description.symlink_to("/nonexistent")
        case "link to itself":
            description.symlink_to(description)
    at = Path("a\0b") if kind == "unreadable name" else tmp_path
    assert callable(read)
    with fuzz.unchanged(tmp_path), pytest.raises(ImageError):
        read(at)


INDEX = {
    "format": 1,
    "images": {
        "amd64": {"url": "https://localhost/x.zip", "sha256": DIGEST, "size": 1, "unpacked": 1, "version": "1"},
    },
}


@fuzz.examples(2000)
@given(content=fuzz.documents(INDEX, {"format": 1, "images": {}}))
def test_whatever_the_index_of_images_says(content: bytes) -> None:
    """The images it names, or an ImageError."""
    with contextlib.suppress(ImageError):
        assert set(index.read_index(content)) <= {"amd64", "arm64"}


@pytest.fixture(scope="module")
def note(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What an owner writes into its lock file."""
    directory = tmp_path_factory.mktemp("note")

    async def owned() -> bytes:
        async with lock.hold([directory], wait_s=0, helpers=directory / "helpers.json"):
            return (directory / LOCK).read_bytes()

    found: dict[str, object] = json.loads(asyncio.run(owned()))
    return found


@fuzz.examples(1000)
@given(data=st.data(), dead=st.booleans())
async def test_whatever_the_lock_file_says(
    tmp_path: Path, note: dict[str, object], data: st.DataObject, dead: bool
) -> None:
    """A lock that is free can be had, one that is held is refused, and who is said to hold it is words."""
    manager = {"pid": os.getpid(), "started": 1, "program": "/x"} if dead else note["manager"]
    content = data.draw(fuzz.documents(note | {"manager": manager, "roster": str(tmp_path / "helpers.json")}))
    (tmp_path / LOCK).write_bytes(content)
    async with lock.hold([tmp_path], wait_s=0):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(InUseError, match="is in use by") as caught:
            async with lock.hold([tmp_path], wait_s=0):
                pass
    assert len(str(caught.value)) < lock.NOTE_MAX_BYTES * 2
    assert (tmp_path / LOCK).read_bytes() == b""


@fuzz.examples(2000)
@given(data=st.data(), dead=st.booleans())
def test_whatever_the_roster_says(tmp_path: Path, data: st.DataObject, dead: bool) -> None:
    """This process, which it names in each place where one may stand, is still there."""
    ourselves = identity.of(os.getpid())
    assert ourselves is not None
    us = {"pid": ourselves.pid, "started": ourselves.started, "program": ourselves.program}
    told = {"boot_id": identity.boot(), "manager": us | ({"started": 1} if dead else {}), "helpers": {"qemu": us}}
    path = tmp_path / "helpers.json"
    path.write_bytes(data.draw(fuzz.documents(told)))
    path.chmod(0o600)
    with fuzz.unchanged(tmp_path):
        assert orphans.reclaim(path) == []


ODD = ["", " ", ".", "..", "a/b", "/", "-x", "a\0b", "a" * 33, "ü", "\ud800", "a\n", "~", "$HOME", "a b", "*"]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_machines(name: str) -> None:
    """No name leads out of the directory of machines."""
    from ovm.errors import OptionError

    with pytest.raises(OptionError):
        machines.check_name(name)


@fuzz.examples(5000)
@given(name=fuzz.texts)
def test_any_name_of_a_machine(name: str) -> None:
    """One that is taken is that of a directory, right below that of all machines."""
    from ovm.errors import OptionError

    with contextlib.suppress(OptionError):
        machines.check_name(name)
        assert paths.machine_dir(name).parent == paths.home() / "machines"
        assert paths.machine_dir(name).resolve().parent == (paths.home() / "machines").resolve()
