"""A packed kernel gives its Image, whole, or an error."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import os
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovm.disks import kernel, plan
from ovm.errors import FileError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NOISE = os.urandom(300_000)
IMAGE = b"MZ" + bytes(54) + b"ARM\x64" + NOISE + bytes(3_000_000) + NOISE[::-1]


def zstandard(content: bytes) -> bytes:
    """As the program ``zstd`` packs: with a check sum."""
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})


def zboot(payload: bytes, method: str, *, behind: bytes = b"") -> bytes:
    """An EFI program with a packed kernel in it, as the kernel's own makefile lays it out."""
    offset = 0x4000
    head = b"MZ\0\0zimg" + struct.pack("<II", offset, len(payload)) + bytes(8) + method.encode().ljust(32, b"\0")
    return head.ljust(offset, b"\x90") + payload + behind


def packed(image: bytes = IMAGE) -> dict[str, bytes]:
    """The ways in which distributions pack a kernel."""
    size = len(image).to_bytes(4, "little")
    return {
        "gzip": gzip.compress(image),
        "zstd": zstandard(image),
        "gzip, filled up": gzip.compress(image) + bytes(70_000),
        "zboot, gzip": zboot(gzip.compress(image), "gzip", behind=b"code"),
        "zboot, zstd22": zboot(zstandard(image), "zstd22", behind=size + b"code"),
    }


def unpacked(path: Path) -> bytes:
    found = kernel.find_packed(path)
    assert found is not None
    with path.open("rb") as opened:
        return b"".join(kernel.unpack(found, opened))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vmlinuz"


@pytest.mark.parametrize("way", packed())
def test_a_packed_kernel_gives_its_image(path, way):
    path.write_bytes(packed()[way])
    found = kernel.find_packed(path)
    assert kernel.packing(path.read_bytes()[:100]) == way.removesuffix(", filled up")
    assert kernel.architecture(kernel.beginning(found)) == "arm64"
    assert kernel.unpacked_size(found) == len(IMAGE)
    assert unpacked(path) == IMAGE


@pytest.mark.parametrize("way", ["gzip", "zstd"])
@pytest.mark.parametrize("size", [1, 7, 4099])
def test_it_does_not_matter_how_the_input_is_cut(path, monkeypatch, way, size):
    monkeypatch.setattr(kernel, "_INPUT_BYTES", size)
    monkeypatch.setattr(kernel, "_PIECE_BYTES", 1000)
    image = IMAGE[:9_000]
    path.write_bytes(packed(image)[way])
    assert unpacked(path) == image


@pytest.mark.parametrize(
    "content",
    [IMAGE, b"MZ" + bytes(0x200) + b"HdrS", b"", b"MZ\0\0zimg", bz2.compress(IMAGE), zboot(b"\xfd7zXZ\0", "xzkern")],
)
def test_what_cannot_be_unpacked_here_is_not_packed(path, content):
    path.write_bytes(content)
    assert kernel.find_packed(path) is None


def test_what_a_zboot_is_packed_with_is_said(path):
    assert kernel.packing(zboot(b"", "xzkern")) == "zboot, xzkern"
    assert kernel.packing(zboot(b"", "\x1b[2J")) == "zboot"
    assert kernel.packing(zboot(b"", "")) == "zboot"


@pytest.mark.parametrize("way", ["gzip", "zstd", "zboot, gzip", "zboot, zstd22"])
def test_damage_is_an_error_of_ours(path, way):
    whole = packed()[way]
    for damaged in (whole[: len(whole) // 2], whole[:100_000] + b"damage" + whole[100_006:]):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"vmlinuz (is truncated|cannot be unpacked)"):
            unpacked(path)


def test_a_wrong_check_sum_is_damage(path):
    whole = packed()["gzip"]
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    with pytest.raises(FileError, match="cannot be unpacked"):
        unpacked(path)


@pytest.mark.parametrize("way", ["gzip", "zstd"])
def test_a_second_part_is_not_left_out_silently(path, way):
    path.write_bytes(packed()[way] * 2)
    with pytest.raises(FileError, match="has extra bytes after its end"):
        unpacked(path)


@pytest.mark.parametrize("pack", [lambda content: gzip.compress(content, 1), zstandard], ids=["gzip", "zstd"])
def test_a_bomb_takes_neither_memory_nor_the_whole_time(path, monkeypatch, pack):
    """It ends at the limit, and no more than a few pieces of it are ever there."""
    monkeypatch.setattr(kernel, "IMAGE_MAX_BYTES", 8 << 20)
    path.write_bytes(pack(bytes(32 << 20)))
    found = kernel.find_packed(path)
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match="holds more than 8388608 bytes"):
            kernel.unpacked_size(found)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(packed(IMAGE[:3_000]))), st.integers(0, 5_000), st.binary(min_size=1, max_size=40))
def test_no_file_can_do_harm(path, way, at, change):
    """Whatever is changed: the same Image, or an error of ours."""
    content = bytearray(packed(IMAGE[:3_000])[way])
    at %= len(content)
    content[at : at + len(change)] = change
    path.write_bytes(content)
    with contextlib.suppress(FileError):
        plan.check_kernel(path, "arm64")
    with contextlib.suppress(FileError):
        if found := kernel.find_packed(path):
            assert kernel.unpacked_size(found) <= kernel.IMAGE_MAX_BYTES
