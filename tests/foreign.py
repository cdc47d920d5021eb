"""A program for the other architecture, of a few instructions: it writes a line to its standard output and ends."""

from __future__ import annotations

import platform
import struct

NAME = {"x86_64": "arm64", "aarch64": "amd64", "arm64": "amd64"}[platform.machine()]
"""The other architecture, in containers' words."""

_LOADED_AT = 0x400000
_HEADERS_BYTES = 64 + 56
_MACHINE = {"arm64": 0xB7, "amd64": 0x3E}


def program(line: str) -> bytes:
    """An ELF executable that writes ``line``."""
    text = line.encode() + b"\n"
    code = {"arm64": _arm64, "amd64": _amd64}[NAME](len(text)) + text
    size = _HEADERS_BYTES + len(code)
    start = _LOADED_AT + _HEADERS_BYTES
    header = struct.pack("<16sHHI", b"\x7fELF\x02\x01\x01", 2, _MACHINE[NAME], 1)
    header += struct.pack("<QQQIHHHHHH", start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOADED_AT, _LOADED_AT, size, size, 0x1000)
    return header + segment + code


def _arm64(length: int) -> bytes:
    return struct.pack(
        "<8I",
        0xD2800020,  # mov x0, #1
        0x10000001 | 7 << 5,  # adr x1, 7 instructions on
        0xD2800002 | length << 5,  # mov x2, #length
        0xD2800808,  # mov x8, #64: write
        0xD4000001,  # svc #0
        0xD2800000,  # mov x0, #0
        0xD2800BA8,  # mov x8, #93: exit
        0xD4000001,  # svc #0
    )


def _amd64(length: int) -> bytes:
    return (
        b"\xb8\x01\x00\x00\x00\xbf\x01\x00\x00\x00"  # mov eax, 1: write; mov edi, 1
        b"\x48\x8d\x35\x10\x00\x00\x00\xba"  # lea rsi, [rip + 16]; mov edx, …
        + struct.pack("<I", length)  # … length
        + b"\x0f\x05\xb8\x3c\x00\x00\x00\x31\xff\x0f\x05"  # syscall; mov eax, 60: exit; xor edi, edi; syscall
    )
