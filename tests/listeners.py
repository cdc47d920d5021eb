"""Where processes listen, as Linux tells in /proc."""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Iterable
from pathlib import Path

_LISTENS = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}
"""The state of a socket that anybody may send to, by table."""
_ACCEPTS = 0x10000
"""The flag of a unix socket that listens."""

Port = tuple[str, str, int]


def ports(pids: Iterable[int]) -> set[Port]:
    """Protocol, address and port of each internet socket of these processes that anybody may send to."""
    inodes = _sockets(pids)
    found = set()
    for table, state in _LISTENS.items():
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((table.removesuffix("6"), _address(address), int(port, 16)))
    return found


def unix(pids: Iterable[int]) -> set[str]:
    """The paths of the unix sockets of these processes that take connections or datagrams; ``@NAME`` has none."""
    inodes = _sockets(pids)
    found = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[6] in inodes and (int(fields[3], 16) & _ACCEPTS or fields[4] == "0002"):
            found.add(fields[7])
    return found


def _sockets(pids: Iterable[int]) -> set[str]:
    found = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                kind, _, inode = str(fd.readlink()).partition(":")
                if kind == "socket":
                    found.add(inode.strip("[]"))
    return found


def _address(told: str) -> str:
    """From words of 32 bits, each in the processor's order of bytes."""
    words = [int(told[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(told), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
