"""An archive gives its one file, whole and as declared, or an error."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovm.disks import archive
from ovm.errors import ArchiveError

IMAGE = b"image" * 1000 + bytes(64_632)


def zipped(content: bytes = IMAGE, name: str = "rootfs.btrfs", *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        opened.writestr(name, content)
    return buffer.getvalue()


def two_files() -> bytes:
    buffer = io.BytesIO(zipped())
    with zipfile.ZipFile(buffer, "a") as opened:
        opened.writestr("__MACOSX/._rootfs.btrfs", b"x")
    return buffer.getvalue()


def special(mode: int) -> bytes:
    info = zipfile.ZipInfo("rootfs.btrfs")
    info.create_system, info.external_attr = 3, mode << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr(info, b"/etc/shadow")
    return buffer.getvalue()


def central(content: bytes, offset: int, value: int, width: int) -> bytes:
    """``content`` with one field of its central directory changed."""
    at = content.rindex(b"PK\1\2") + offset
    return content[:at] + value.to_bytes(width, "little") + content[at + width :]


CRC, PACKED_SIZE, SIZE, FLAGS, METHOD, HEADER_OFFSET = 16, 20, 24, 8, 10, 42


def renamed(name: bytes) -> bytes:
    """A name ``zipfile`` itself would not write."""
    return zipped(name="n" * len(name)).replace(b"n" * len(name), name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(renamed(b"../../etc/passwd"), "unsafe name", id="dot-dot"),
        pytest.param(renamed(b"/etc/passwd"), "unsafe name", id="absolute"),
        pytest.param(renamed(b"..\\rootfs.btrfs"), "unsafe name", id="backslash"),
        pytest.param(renamed(b"C:rootfs.btrfs"), "unsafe name", id="drive"),
        pytest.param(renamed(b"rootfs.btrfs\0.txt"), "unsafe name", id="nul"),
        pytest.param(two_files(), "holds 2 files instead of one", id="two files"),
        pytest.param(zipped(name="directory/", content=b""), "holds 0 files", id="no file"),
        pytest.param(special(stat.S_IFLNK | 0o777), "a symbolic link", id="symlink"),
        pytest.param(special(stat.S_IFCHR | 0o600), "a special file", id="device"),
        pytest.param(central(zipped(), FLAGS, 1, 2), "is encrypted", id="encrypted"),
        pytest.param(zipped(method=zipfile.ZIP_LZMA), "compression method 14", id="lzma"),
        pytest.param(central(zipped(), METHOD, 99, 2), "compression method 99", id="unknown method"),
        pytest.param(zipped(b""), "is empty", id="empty"),
        pytest.param(central(zipped(), SIZE, 0xFFFFFFFE, 4), "which is impossible", id="impossible ratio"),
        pytest.param(central(zipped(method=0), SIZE, 512, 4), "which is impossible", id="stored size lies"),
        pytest.param(zipped()[:-30], "not a complete zip", id="cut behind"),
        pytest.param(zipped()[40:], "not a complete zip|cannot be read", id="cut in front"),
        pytest.param(central(zipped(), HEADER_OFFSET, 7, 4), "no file at the offset", id="offset lies"),
        pytest.param(central(zipped(), PACKED_SIZE, 1 << 20, 4), "truncated", id="packed size lies"),
        pytest.param(b"PK\3\4 not really", "not a complete zip", id="no zip"),
    ],
)
def test_a_hostile_archive_is_refused(tmp_path, content, words):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match=words) as error:
        archive.inspect(path)
    assert error.value.hint


def test_a_size_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "SIZE_MAX_BYTES", 1024)
    path = tmp_path / "a.zip"
    path.write_bytes(zipped())
    with pytest.raises(ArchiveError, match="declares a file of 69632 bytes"):
        archive.inspect(path)


def unpacked(path: Path) -> bytes:
    member = archive.inspect(path)
    with path.open("rb") as opened:
        return b"".join(archive.inflate(member, opened))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "content", [IMAGE, os.urandom(3 << 20), bytes(5 << 20), b"a"], ids=["image", "random", "zeros", "one byte"]
)
def test_an_archive_gives_back_what_was_packed(tmp_path, content, method):
    path = tmp_path / "a.zip"
    path.write_bytes(b"a stub in front" + zipped(content, "deep/any name", method=method))
    assert unpacked(path) == content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(central(zipped(), CRC, 0, 4), "checksum", id="sum"),
        pytest.param(central(zipped(), SIZE, len(IMAGE) + 1, 4), "instead of the 69633", id="larger"),
        pytest.param(central(zipped(), SIZE, len(IMAGE) - 1, 4), "more than the 69631", id="smaller"),
        pytest.param(central(zipped(), PACKED_SIZE, 80, 4), "truncated", id="packed smaller"),
        pytest.param(central(zipped(), PACKED_SIZE, 100, 4), "extra bytes after its end", id="packed larger"),
        pytest.param(zipped().replace(b"rootfs.btrfs", b"rootfs.btrf\xff", 1), None, id="names differ"),
    ],
)
def test_what_an_archive_declares_must_be_true(tmp_path, content, words):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    if words is None:  # no name in it matters
        assert unpacked(path) == IMAGE
        return
    with pytest.raises(ArchiveError, match=words):
        unpacked(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_archive_gives_the_whole_file_or_an_error(tmp_path, data):
    good = zipped(b"content " * 100 + bytes(900))
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.zip"
    path.write_bytes(bad[: data.draw(st.integers(0, len(bad)))] if data.draw(st.booleans()) else bad)
    with contextlib.suppress(ArchiveError):
        assert unpacked(path) == b"content " * 100 + bytes(900)
