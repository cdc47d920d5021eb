"""Zip archives put together by hand, so that every field of them can lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

import fuzz

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END_64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR_64 = struct.Struct("<4sIQI")

STORED, DEFLATED = 0, 8
SYMLINK = 0o120777 << 16
NAMES = [
    "rootfs.btrfs",
    "kernel",
    "image.json",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a\\b",
    "C:x",
    "",
    "dir/",
    "ü",
    "a\0b",
]


@dataclass
class Member:
    """One file, and where each of its two headers says something else."""

    name: bytes
    content: bytes
    method: int = DEFLATED
    lies: dict[str, int] = field(default_factory=dict)
    """Of both headers, by the names in :func:`_fields`; ``local`` and ``central`` before it, of that one alone."""
    extra: bytes = b""

    @property
    def packed(self) -> bytes:
        if self.method != DEFLATED:
            return self.content
        packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        return packer.compress(self.content) + packer.flush()

    def fields(self, which: str) -> dict[str, int]:
        """What a header says."""
        honest = {
            "version": 20,
            "flags": 0,
            "method": self.method,
            "crc": zlib.crc32(self.content),
            "packed": len(self.packed),
            "size": len(self.content),
            "name": len(self.name),
            "extra": len(self.extra),
            "attributes": 0o100644 << 16,
        }
        return honest | {name: self.lies.get(f"{which} {name}", self.lies.get(name, honest[name])) for name in honest}


def assemble(members: list[Member], *, zip64: bool = False, before: bytes = b"", **lies: int) -> bytes:
    """The archive; ``lies`` are those of its end: count, size, offset, comment, and of each member's place."""
    content, directory = bytearray(before), bytearray()
    for member in members:
        place = lies.get("place", len(content))
        told = member.fields("local")
        head = (told["version"], told["flags"], told["method"], 0, 0x21, told["crc"], told["packed"], told["size"])
        content += (
            LOCAL.pack(b"PK\3\4", *head, told["name"], told["extra"]) + member.name + member.extra + member.packed
        )
        told = member.fields("central")
        head = (20, told["version"], told["flags"], told["method"], 0, 0x21, told["crc"], told["packed"], told["size"])
        tail = (told["name"], told["extra"], 0, 0, 0, told["attributes"], place)
        directory += CENTRAL.pack(b"PK\1\2", *head, *tail) + member.name + member.extra
    at, count = lies.get("offset", len(content)), lies.get("count", len(members))
    size = lies.get("size", len(directory))
    content += directory
    if zip64:
        end = len(content)
        content += END_64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at)
        content += LOCATOR_64.pack(b"PK\6\7", 0, end, 1)
        at, count, size = 2**32 - 1, 2**16 - 1, 2**32 - 1
    end_fields = (0, 0, count % 2**16, count % 2**16, size % 2**32, at % 2**32, lies.get("comment", 0) % 2**16)
    return bytes(content + END.pack(b"PK\5\6", *end_fields))


LIES: dict[str, st.SearchStrategy[int]] = {
    "version": st.sampled_from([0, 45, 63, 2**16 - 1]),
    "flags": st.sampled_from([0x1, 0x8, 0x20, 0x40, 0x800, 0x2000, 0xFFFF]),
    "method": st.sampled_from([STORED, 1, 6, DEFLATED, 9, 12, 14, 93, 99, 2**16 - 1]),
    "crc": st.integers(0, 2**32 - 1),
    "packed": st.sampled_from([0, 1, 2**31, 2**32 - 1]) | st.integers(0, 4096),
    "size": st.sampled_from([0, 1, 512, 2**31, 2**32 - 1]) | st.integers(0, 2**20),
    "name": st.integers(0, 40) | st.just(2**16 - 1),
    "extra": st.integers(0, 40) | st.just(2**16 - 1),
    "attributes": st.sampled_from([0, SYMLINK, 0o010644 << 16, 0o020644 << 16, 0o040755 << 16, 2**32 - 1]),
}
ENDS: dict[str, st.SearchStrategy[int]] = {
    "count": st.sampled_from([0, 1, 2, 2**16 - 1, 2**63]),
    "size": st.integers(0, 200) | st.sampled_from([2**32 - 1, 2**62]),
    "offset": st.integers(0, 200) | st.sampled_from([2**32 - 1, 2**62]),
    "comment": st.integers(0, 20),
    "place": st.integers(0, 200) | st.just(2**32 - 1),
}


@st.composite
def zips(draw: st.DrawFn, honest: Mapping[str, bytes]) -> bytes:
    """An archive of these files: with lies in it, with more or fewer files, damaged, all of it, or as it should be."""
    members = [
        Member(name.encode(), content, draw(st.sampled_from([DEFLATED, DEFLATED, STORED])))
        for name, content in honest.items()
    ]
    end: dict[str, Any] = {"zip64": draw(st.sampled_from([False, False, False, True]))}
    for _ in range(draw(st.integers(0, 2))):
        match draw(st.sampled_from(["lie", "lie", "lie", "more", "fewer", "name", "extra", "end", "before"])):
            case "lie" if members:
                one, what = draw(st.sampled_from(members)), draw(st.sampled_from(sorted(LIES)))
                where = draw(st.sampled_from(["", "local ", "central "]))
                one.lies[where + what] = draw(LIES[what])
            case "more":
                name = draw(st.sampled_from(NAMES)).encode()
                members += [Member(name, b"x" * draw(st.integers(0, 600)))] * draw(st.sampled_from([1, 2, 2000]))
            case "fewer" if members:
                members.pop()
            case "name" if members:
                draw(st.sampled_from(members)).name = draw(st.sampled_from(NAMES)).encode() or draw(
                    st.binary(max_size=9)
                )
            case "extra" if members:
                body = draw(st.binary(max_size=32))
                draw(st.sampled_from(members)).extra = struct.pack("<HH", 1, draw(st.integers(0, 40))) + body
            case "end":
                what = draw(st.sampled_from(sorted(ENDS)))
                end[what] = draw(ENDS[what])
            case "before":
                end["before"] = draw(st.binary(max_size=100))
    content = assemble(members, **end)
    return fuzz.mutated(draw, content) if draw(st.sampled_from([False, False, True])) else content
