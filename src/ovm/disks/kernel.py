"""What a kernel's file is, and the Image in a packed one.

An arm64 kernel has to be an Image: it does not unpack itself, vfkit refuses every other form, and QEMU takes some of
them. But distributions pack it: with gzip or zstd, or so in an EFI program that unpacks it (zboot).
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
"""Of each architecture: where its kernel's magic is, the magic, what such a file is called."""
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"\x02\x21\x4c\x18": "lz4",
    b"BZh": "bzip2",
    b"\x5d\0\0": "lzma",
    b"\x89LZO\0": "lzo",
}
"""What the kernel's unpackers know, by how it begins."""
UNPACKED_HERE = frozenset({"gzip", "zstd"})
SUFFIXES = frozenset({".gz", ".zst"})
"""What the name of a packed kernel may end with and that of its Image does not."""
IMAGE_MAX_BYTES = 512 * 1024 * 1024

_HEAD_BYTES = 4096
_INPUT_BYTES = 64 * 1024
_PIECE_BYTES = 1024 * 1024
_ZBOOT = struct.Struct("<2s2x4sII8x32s")
"""MZ, zimg, where the payload is and its length, and what it is packed with."""

_FETCH_AGAIN = "fetch or build it again"


@dataclass(frozen=True, slots=True)
class Packed:
    """Where in a file the packed Image is."""

    path: Path
    compression: str
    offset: int
    length: int
    """Of what is packed, in bytes."""


def architecture(head: bytes) -> str | None:
    """What processor the kernel that begins with ``head`` is for; ``None`` if that is no kernel."""
    return next((arch for arch, (at, magic, _) in FORMS.items() if head[at : at + len(magic)] == magic), None)


def compression(head: bytes) -> str | None:
    """How the file that begins with ``head`` is packed; ``None`` if it is not."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def find_packed(path: Path) -> Packed | None:
    """What is packed in ``path``, be it a kernel or not; ``None`` if there is nothing that can be unpacked here.

    Raises:
        FileError: it cannot be read, or is cut short.
    """
    try:
        with path.open("rb") as opened:
            head = opened.read(_ZBOOT.size)
            offset, length = 0, os.fstat(opened.fileno()).st_size
            if is_zboot(head):
                _, _, offset, payload, _ = _ZBOOT.unpack(head)
                if offset + payload > length:
                    raise FileError(f"{path} is cut short: {length} bytes of {offset + payload}", hint=_FETCH_AGAIN)
                opened.seek(offset)
                head, length = opened.read(_ZBOOT.size), payload
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    method = compression(head)
    return Packed(path, method, offset, length) if method in UNPACKED_HERE else None


def is_zboot(head: bytes) -> bool:
    """Whether the file that begins with ``head`` is an EFI program that unpacks a kernel."""
    return len(head) >= _ZBOOT.size and head[:2] == b"MZ" and head[4:8] == b"zimg"


def packing(head: bytes) -> str | None:
    """In words, how the kernel that begins with ``head`` is packed; ``None`` if it is not."""
    if not is_zboot(head):
        return compression(head)
    method = _ZBOOT.unpack_from(head)[-1].split(b"\0")[0].decode("ascii", "replace")
    return f"zboot, {method}" if method.isprintable() and method else "zboot"


def beginning(packed: Packed) -> bytes:
    """The first bytes of what is packed; none where it is damaged."""
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
    """Bytes of the Image, found out by unpacking it: what a file declares may be missing or a lie.

    Raises:
        FileError: as :func:`unpack` does.
    """
    with packed.path.open("rb") as source:
        return sum(map(len, unpack(packed, source)))


def unpack(packed: Packed, source: BinaryIO) -> Iterator[bytes]:
    """The Image out of the opened file, in pieces; the last one has come only when its check sum, if any, agrees.

    Raises:
        FileError: damaged, cut, or larger than any kernel.
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
                raise _damaged(packed, "is cut short")
        try:
            piece = decoder.decompress(data, _PIECE_BYTES)
        except error_type as error:
            raise _damaged(packed, f"cannot be unpacked: {error}") from error
        size += len(piece)
        if size > IMAGE_MAX_BYTES:
            raise _damaged(packed, f"holds more than {IMAGE_MAX_BYTES} bytes, which is no kernel")
        if piece:
            yield piece
    rest = decoder.unused_data
    while not rest.strip(b"\0"):  # zeros may fill up a block; anything else is a second part, or no part of it
        rest = source.read(min(left, _INPUT_BYTES))
        left -= len(rest)
        if not rest:
            return
    raise _damaged(packed, "has bytes behind its end")


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

        wrong: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stubs take it for an instance
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP), wrong
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.ZstdDecompressor(), zstd.ZstdError


def _damaged(packed: Packed, what: str) -> FileError:
    return FileError(f"the kernel in {packed.path} {what}", hint=_FETCH_AGAIN)
