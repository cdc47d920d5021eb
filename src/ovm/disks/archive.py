"""A rootfs in a zip: one file, read sequentially; no name or path in the archive is ever used."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ovm.errors import ArchiveError

SIZE_MAX_BYTES = 64 * 1024**3
DEFLATE_RATIO_MAX = 1032
"""The highest ratio that deflate can reach; a larger declared size is false."""

_INPUT_BYTES = 64 * 1024
_PIECE_BYTES = 1024 * 1024
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_PATCH = 0x20
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_PACK_ALONE = "pack the image alone: zip -X rootfs.btrfs.zip rootfs.btrfs (other tools add their own entries)"
_FETCH_AGAIN = "fetch or pack it again"


@dataclass(frozen=True, slots=True)
class Member:
    """Position and properties of the one file, as the archive declares them."""

    archive: Path
    offset: int
    """Position of the first compressed byte."""
    compressed: int
    size: int
    crc: int
    deflated: bool


def inspect(archive: Path) -> Member:
    """Find the one file in ``archive``. Reads only the zip's directory.

    Raises:
        ArchiveError: the archive is not a zip, truncated, hostile, or does not hold exactly one file.
    """
    try:
        _check_end(archive)
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                _check_name(archive, member)
            files = [member for member in members if not member.is_dir()]
            if len(files) != 1:
                raise ArchiveError(f"{archive} holds {len(files)} files instead of one", hint=_PACK_ALONE)
            _check_member(archive, files[0])
        return _located(archive, files[0])
    except ArchiveError:
        raise
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
        OverflowError,
    ) as error:
        raise ArchiveError(f"{archive} is not a complete zip archive: {error}", hint=_FETCH_AGAIN) from error
    except OSError as error:  # a false offset makes seek fail, and so does an unreadable disk
        raise ArchiveError(f"{archive} cannot be read: {error.strerror or error}", hint=_FETCH_AGAIN) from error


def inflate(member: Member, source: BinaryIO) -> Iterator[bytes]:
    """Yield the file's content from the opened archive, in pieces; finish normally only if size and checksum match.

    Raises:
        ArchiveError: the file is damaged, truncated, or differs from the archive's directory.
    """
    from isal import igzip_lib, isal_zlib

    source.seek(member.offset)
    size = crc = 0
    try:
        for piece in _inflated(member, source) if member.deflated else _stored(member, source):
            size += len(piece)
            if size > member.size:
                raise _damaged(member, f"holds more than the {member.size} bytes it declares")
            crc = isal_zlib.crc32(piece, crc)
            yield piece
    except igzip_lib.IsalError as error:  # type: ignore[misc]  # its stubs declare the class as an instance
        raise _damaged(member, f"cannot be unpacked: {error}") from error
    if size != member.size:
        raise _damaged(member, f"holds {size} bytes instead of the {member.size} it declares")
    if crc != member.crc:
        raise _damaged(member, "does not match its checksum")


def _inflated(member: Member, source: BinaryIO) -> Iterator[bytes]:
    from isal import isal_zlib

    decoder = isal_zlib.decompressobj(-zlib.MAX_WBITS)
    ended = False
    for data in _stored(member, source):
        if ended:
            raise _damaged(member, "has extra bytes after its end")
        rest = data
        while True:
            piece: bytes = decoder.decompress(rest, _PIECE_BYTES)
            rest = decoder.unconsumed_tail
            if piece:
                yield piece
            if decoder.eof or (len(piece) < _PIECE_BYTES and not rest):
                break
            if not piece:
                raise _damaged(member, "cannot be unpacked")
        ended = decoder.eof
    if not ended:
        raise _damaged(member, "is truncated")
    if decoder.unused_data:
        raise _damaged(member, "has extra bytes after its end")


def _stored(member: Member, source: BinaryIO) -> Iterator[bytes]:
    left = member.compressed
    while left:
        data = source.read(min(left, _INPUT_BYTES))
        if not data:
            raise _damaged(member, "is truncated")
        left -= len(data)
        yield data


def _damaged(member: Member, what: str) -> ArchiveError:
    return ArchiveError(f"the file in {member.archive} {what}", hint=_FETCH_AGAIN)


def _check_end(archive: Path) -> None:
    """Raise the OSError of an unreadable end; zipfile would report that the file is not a zip."""
    with archive.open("rb") as opened:
        opened.seek(max(opened.seek(0, 2) - 1, 0))
        opened.read(1)


def _check_name(archive: Path, member: zipfile.ZipInfo) -> None:
    name = member.orig_filename
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/") or name[1:2] == ":":
        raise ArchiveError(f"{archive} holds a file with the unsafe name {name!r}", hint="do not trust this archive")


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in {0, stat.S_IFREG}:
        what = "a symbolic link" if kind == stat.S_IFLNK else "a special file"
        raise ArchiveError(f"{archive} holds {what} instead of an image", hint=_PACK_ALONE)
    if member.flag_bits & _ENCRYPTED:
        raise ArchiveError(f"{archive} is encrypted", hint="pack it without a password")
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} or member.flag_bits & _PATCH:
        raise ArchiveError(
            f"{archive} uses compression method {member.compress_type}",
            hint="pack it with deflate, the default",
        )
    if not member.file_size:
        raise ArchiveError(f"the file in {archive} is empty", hint=_PACK_ALONE)
    if member.file_size > SIZE_MAX_BYTES:
        raise ArchiveError(
            f"{archive} declares a file of {member.file_size} bytes",
            hint=f"use an image of at most {SIZE_MAX_BYTES} bytes",
        )
    stored = member.compress_type == zipfile.ZIP_STORED
    most = member.compress_size * (1 if stored else DEFLATE_RATIO_MAX)
    if member.file_size > most or (stored and member.file_size != most):
        raise ArchiveError(
            f"{archive} declares {member.file_size} bytes from {member.compress_size} compressed, which is impossible",
            hint="do not trust this archive",
        )


def _located(archive: Path, member: zipfile.ZipInfo) -> Member:
    with archive.open("rb") as opened:
        opened.seek(member.header_offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(opened.read(_LOCAL_HEADER.size))
        if magic != b"PK\3\4":
            raise zipfile.BadZipFile("no file at the offset in its directory")
        offset = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if offset + member.compress_size > opened.seek(0, 2):
            raise zipfile.BadZipFile("it is truncated")
    deflated = member.compress_type == zipfile.ZIP_DEFLATED
    return Member(archive, offset, member.compress_size, member.file_size, member.CRC, deflated)
