"""The format of a kernel file, and the Image in a compressed one.

An arm64 kernel must be an Image: it does not unpack itself, vfkit rejects every other form, and QEMU accepts only
some. But distributions compress it with gzip or zstd, also within an EFI program that unpacks it (zboot).
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ovm.errors import FileError

FORMS = {"x86_64": (0x202, b"HdrS", "bzImage"), "arm64": (0x38, b"ARM\x64", "Image")}
"""By architecture: the offset of its kernel's magic number, the magic number, and the name of the format."""
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"\x02\x21\x4c\x18": "lz4",
    b"BZh": "bzip2",
    b"\x5d\0\0": "lzma",
    b"\x89LZO\0": "lzo",
}
"""The compressions that Linux can unpack, by magic number."""
UNPACKED_HERE = frozenset({"gzip", "zstd"})
SUFFIXES = frozenset({".gz", ".zst"})
"""Suffixes of a packed kernel's name, removed from the name of its Image."""
IMAGE_MAX_BYTES = 512 * 1024 * 1024

_HEAD_BYTES = 4096
_INPUT_BYTES = 64 * 1024
_PIECE_BYTES = 1024 * 1024
_ZBOOT = struct.Struct("<2s2x4sII8x32s")
"""MZ, zimg, the payload's offset and length, and its compression."""

_FETCH_AGAIN = "fetch or build it again"


@dataclass(frozen=True, slots=True)
class Packed:
    """Position of the packed Image in a file."""

    path: Path
    compression: str
    offset: int
    length: int
    """Packed size in bytes."""


def architecture(head: bytes) -> str | None:
    """Return the architecture of the kernel that begins with ``head``; ``None`` if it is not a kernel."""
    return next((arch for arch, (at, magic, _) in FORMS.items() if head[at : at + len(magic)] == magic), None)


def compression(head: bytes) -> str | None:
    """Return the compression of the file that begins with ``head``; ``None`` if it is not compressed."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def find_packed(path: Path) -> Packed | None:
    """Find packed content in ``path``, a kernel or not; ``None`` if ovm can unpack nothing there.

    Raises:
        FileError: it cannot be read, or is truncated.
    """
    try:
        with path.open("rb") as opened:
            head = opened.read(_ZBOOT.size)
            offset, length = 0, os.fstat(opened.fileno()).st_size
            if is_zboot(head):
                _, _, offset, payload, _ = _ZBOOT.unpack(head)
                if offset + payload > length:
                    raise FileError(f"{path} is truncated: {length} bytes of {offset + payload}", hint=_FETCH_AGAIN)
                opened.seek(offset)
                head, length = opened.read(_ZBOOT.size), payload
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    method = compression(head)
    return Packed(path, method, offset, length) if method in UNPACKED_HERE else None


def is_zboot(head: bytes) -> bool:
    """Return whether the file that begins with ``head`` is an EFI program that unpacks a kernel."""
    return len(head) >= _ZBOOT.size and head[:2] == b"MZ" and head[4:8] == b"zimg"


def packing(head: bytes) -> str | None:
    """Describe the packing of the kernel that begins with ``head``; ``None`` if it is not packed."""
    if not is_zboot(head):
        return compression(head)
    method = _ZBOOT.unpack_from(head)[-1].split(b"\0")[0].decode("ascii", "replace")
    return f"zboot, {method}" if method.isprintable() and method else "zboot"


def beginning(packed: Packed) -> bytes:
    """Return the first unpacked bytes; none if the packed data is damaged."""
    pieces: list[bytes] = []
    try:
        with packed.path.open("rb") as source:
            for piece in unpack(packed, source):
                pieces.append(piece)
                if sum(map(len, pieces)) >= _HEAD_BYTES:
                    break
    except (FileError, OSError):
        return b""
    return b"".join(pieces)


def unpacked_size(packed: Packed) -> int:
    """Return the size of the Image, found by unpacking it: a declared size may be missing or false.

    Raises:
        FileError: as :func:`unpack` does.
    """
    with packed.path.open("rb") as source:
        return sum(map(len, unpack(packed, source)))


def unpack(packed: Packed, source: BinaryIO) -> Iterator[bytes]:
    """Yield the Image from the opened file, in pieces; finish normally only if its checksum, if any, matches.

    Raises:
        FileError: the data is damaged, truncated, or larger than any kernel.
    """
    decoder, error_type = _decoder(packed.compression)
    source.seek(packed.offset)
    left, size = packed.length, 0
    while not decoder.eof:
        data = b""
        if decoder.needs_input:
            data = source.read(min(left, _INPUT_BYTES))
            left -= len(data)
            if not data:
                raise _damaged(packed, "is truncated")
        try:
            piece = decoder.decompress(data, _PIECE_BYTES)
        except error_type as error:
            raise _damaged(packed, f"cannot be unpacked: {error}") from error
        size += len(piece)
        if size > IMAGE_MAX_BYTES:
            raise _damaged(packed, f"holds more than {IMAGE_MAX_BYTES} bytes, too many for a kernel")
        if piece:
            yield piece
    rest = decoder.unused_data
    while not rest.strip(b"\0"):  # zeros may pad a block; anything else is a second stream or garbage
        rest = source.read(min(left, _INPUT_BYTES))
        left -= len(rest)
        if not rest:
            return
    raise _damaged(packed, "has extra bytes after its end")


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


def _decoder(method: str) -> tuple[_Decoder, type[Exception]]:
    if method == "gzip":
        from isal import igzip_lib

        wrong: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stubs declare the class as an instance
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP), wrong
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.ZstdDecompressor(), zstd.ZstdError


def _damaged(packed: Packed, what: str) -> FileError:
    return FileError(f"the kernel in {packed.path} {what}", hint=_FETCH_AGAIN)
