"""Releases: packed, and refused where they are not what they should be."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from ovm.errors import ImageError
from ovm.image import pack_image, verify_image
from ovm.image.release import MEMBERS, Packed
from releases import (
    MIB,
    beside,
    fetch,
    make_image,
    version,
)


async def test_packing_twice_is_the_same(packed, tmp_path):
    """The same image, the same bytes; the name says what it is."""
    again = await pack_image(packed.path.parent / "image", tmp_path / "new" / "directory")
    assert again.sha256 == packed.sha256
    assert again.path.name == packed.path.name
    assert [path.name for path in again.path.parent.iterdir()] == [packed.path.name]


@pytest.mark.parametrize("name", ["kernel", "manifest"])
async def test_a_damaged_image_is_not_packed(tmp_path, name):
    """What was released could not be trusted."""
    image = make_image(tmp_path / "image")
    (image / name).write_bytes(b"\0" * (image / name).stat().st_size)
    with pytest.raises(ImageError, match=name):
        await pack_image(image, tmp_path)
    assert list(tmp_path.iterdir()) == [image]


async def test_ordinary_tools_unpack_it(packed, tmp_path):
    """What they make of it is an image."""
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(tmp_path / "by-hand")
    await verify_image(tmp_path / "by-hand")


# Refused


async def test_an_archive_that_is_cut(web, target):
    """The server has no more of it, and says so."""
    web.content = web.content[:-1000]
    with pytest.raises(ImageError, match="not a complete zip"):
        await fetch(web.url(), target)
    assert beside(target) == []
    assert version(target) == "old"


async def test_a_flipped_byte(web, target):
    """The sum of the file it is in is wrong."""
    content = bytearray(web.content)
    content[len(content) // 2] ^= 1
    web.content = bytes(content)
    with pytest.raises(ImageError, match="not a complete zip"):
        await fetch(web.url(), target)
    assert beside(target) == []


def repack(packed: Packed, path: Path, entries: dict[str, str | bytes]) -> bytes:
    """A zip of these names; content that is a string is the image's file of that name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            source = packed.path.parent / "image"
            archive.writestr(name, (source / content).read_bytes() if isinstance(content, str) else content)
    return path.read_bytes()


WHOLE: dict[str, str | bytes] = {name: name for name in MEMBERS}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"../evil": b"x"}, r"'\.\./evil'"),
        ({"/etc/passwd": b"x"}, "contains"),
        ({"sub/kernel": b"x"}, "contains"),
        ({"a\\b": b"x"}, "contains"),
        ({"extra": b""}, "contains"),
        ({"kernel": None}, "contains"),
        ({"image.json": None}, "contains"),
        ({"kernel": b"kernel"}, "kernel .* has 6 bytes instead of 5994"),
        ({"kernel": b"K" + b"kernel" * 998 + b"ernel"}, "kernel .* is damaged"),
        ({"manifest": b"other file"}, "manifest .* is damaged"),
        ({"image.json": b"{}"}, r"image\.json .* is invalid"),
        ({"image.json": b'{"format": 2, "guest": "ovm"}'}, "another kind"),
        ({"image.json": b" " * (MIB + 1)}, "declares"),
    ],
)
async def test_archives_that_are_refused(web, packed, target, tmp_path, changes, complaint):
    """Whatever is in them, nothing of it is written outside, or stays."""
    entries = {name: content for name, content in (WHOLE | changes).items() if content is not None}
    web.content = repack(packed, tmp_path / "odd.zip", entries)
    with pytest.raises(ImageError, match=complaint):
        await fetch(web.url(), target)
    assert beside(target) == []
    assert version(target) == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "odd.zip"]


async def test_a_name_twice(web, packed, target, tmp_path):
    """Whoever looks at it would see one kernel and run the other."""
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name in MEMBERS:
            archive.write(packed.path.parent / "image" / name, name)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("kernel", b"another")
    web.content = (tmp_path / "odd.zip").read_bytes()
    with pytest.raises(ImageError, match="'kernel', 'kernel'"):
        await fetch(web.url(), target)
