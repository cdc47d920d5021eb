"""Generated archives: the file that was packed, whole, or an error of ours and nothing written."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
import fuzz_zips
import releases
from fuzz_zips import Member, assemble
from ovm.disks import archive, install, plan
from ovm.errors import ImageError, InputError, SpaceError
from ovm.image import images, release
from ovm.model.options import OriginPath, Versions

ROOTFS = bytes(range(256)) * 8 + bytes(64 << 10)
NAME = "rootfs.btrfs"
VERSIONS = Versions(gvproxy="1", kernel="1", initrd="1", rootfs="1")


@pytest.fixture
def origin(tmp_path: Path) -> OriginPath:
    """Nobody could object to any of it, but for the archive."""
    contents = {
        "gvproxy": b"#!",
        "kernel": b"MZ" + bytes(0x200) + b"HdrS" + bytes(1024),
        "initrd": b"070701",
        f"{NAME}.zip": assemble([Member(NAME.encode(), ROOTFS)]),
    }
    (tmp_path / "origin").mkdir()
    (tmp_path / "target").mkdir()
    for name, content in contents.items():
        (tmp_path / "origin" / name).write_bytes(content)
    (tmp_path / "origin" / "gvproxy").chmod(0o755)
    at = {name.removesuffix(".zip").partition(".")[0]: tmp_path / "origin" / name for name in contents}
    return OriginPath(**at)


async def made(origin: OriginPath, target: Path) -> bytes:
    """What a machine's rootfs would be."""
    plan.check_origins(origin, arch="x86_64", rootfs_must_be_btrfs=False)
    return (await install.prepare(origin, VERSIONS, target)).rootfs.read_bytes()


async def test_the_archives_are_archives(origin: OriginPath, tmp_path: Path) -> None:
    """What is put together by hand, and does not lie, is understood."""
    for zip64 in (False, True):
        origin.rootfs.write_bytes(assemble([Member(NAME.encode(), ROOTFS)], zip64=zip64))
        assert await made(origin, tmp_path / "target") == ROOTFS
        shutil.rmtree(tmp_path / "target")
        (tmp_path / "target").mkdir()


@fuzz.examples(2500)
@given(content=fuzz_zips.zips({NAME: ROOTFS}))
async def test_whatever_is_in_the_archive_of_a_rootfs(origin: OriginPath, tmp_path: Path, content: bytes) -> None:
    """A rootfs is made that is what the archive itself declares; else none is, and the directory is as it was."""
    target = tmp_path / "target"
    for path in target.iterdir():
        path.unlink()
    origin.rootfs.write_bytes(content)
    before = fuzz.snapshot(tmp_path)
    try:
        found = await made(origin, target)
    except InputError:
        after = fuzz.snapshot(tmp_path)
        times = (str(target),)  # its own: what was begun in it has been removed
        assert {name: told for name, told in after.items() if name not in times} == {
            name: told for name, told in before.items() if name not in times
        }
        return
    declared = archive.inspect(origin.rootfs)
    assert (len(found), zlib.crc32(found)) == (declared.size, declared.crc)
    assert len(found) <= len(content) * archive.DEFLATE_RATIO_MAX
    assert {path.name for path in target.iterdir()} == {
        "gvproxy", "kernel", "initrd", NAME, "versions.json", "digests.json",
    }  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a release, by name."""
    image = releases.make_image(tmp_path_factory.mktemp("image") / "image", rootfs=b"rootfs" * 512)
    return {name: (image / name).read_bytes() for name in release.MEMBERS}


@fuzz.examples(2500)
@given(data=st.data())
async def test_whatever_is_in_a_release(tmp_path: Path, packed: dict[str, bytes], data: st.DataObject) -> None:
    """An image with every digest right, or an ImageError, and nothing outside of the directory it was unpacked into."""
    files = dict(packed)
    if data.draw(st.sampled_from([False, False, True])):
        files["image.json"] = data.draw(fuzz.documents(json.loads(packed["image.json"])))
    path, image = tmp_path / "release.zip", tmp_path / "image"
    shutil.rmtree(image, ignore_errors=True)
    path.write_bytes(data.draw(fuzz_zips.zips(files)))
    before = {name: told for name, told in fuzz.snapshot(tmp_path).items() if name != str(tmp_path)}
    with contextlib.suppress(ImageError):
        assert release.inspect_release(path).arch in {"amd64", "arm64"}
    try:
        release.unpack_release(path, image, "amd64", lambda _done, _total: None)
    except (ImageError, SpaceError):
        pass
    else:
        await images.verify_image(image)
        assert {found.name for found in image.iterdir()} == set(release.MEMBERS)
    shutil.rmtree(image, ignore_errors=True)
    assert {name: told for name, told in fuzz.snapshot(tmp_path).items() if name != str(tmp_path)} == before


BOMB = 384 << 20
HOLD = 192 << 20
"""Bytes a program may have here: enough for Python and its libraries."""

READ = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), int(sys.argv[2])))
from ovm.disks import archive
member = archive.inspect(Path(sys.argv[1]))
with member.archive.open("rb") as source:
    print(sum(len(piece) for piece in archive.inflate(member, source)))
"""


@pytest.mark.parametrize("more", [0, 1])
def test_a_bomb_is_read_in_pieces(tmp_path: Path, more: int) -> None:
    """What was packed a thousand times smaller never is in memory at once; nor is there more than was declared."""
    bomb = Member(NAME.encode(), bytes(BOMB))
    if more:
        bomb.lies["size"] = len(bomb.content) - 1
    (tmp_path / "bomb.zip").write_bytes(assemble([bomb]))
    del bomb
    program = [sys.executable, "-c", READ, tmp_path / "bomb.zip", str(HOLD)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    if more:
        assert f"holds more than the {BOMB - 1} bytes it declares" in done.stderr
    else:
        assert (done.stdout, done.stderr) == (f"{BOMB}\n", "")
