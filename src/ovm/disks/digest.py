"""A digest for files that are mostly holes.

It is the SHA-256 of the SHA-256s of a file's pieces. All pieces of zeros share one SHA-256, so a hole costs nothing: a
1 GiB rootfs with 250 MiB of data takes a quarter of the time of a plain SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from typing import Protocol

from ovm.disks.copying import data_ranges

PIECE_BYTES = 1024 * 1024

PLAIN = "sha256:"
"""Prefix of a recorded digest that is a plain SHA-256, known from elsewhere."""

_ZEROS = bytes(PIECE_BYTES)


class Hash(Protocol):
    """An incremental digest."""

    def update(self, data: bytes, /) -> None:
        """Add ``data``."""

    def hexdigest(self) -> str:
        """Return the digest of all data so far."""


def of_kind(recorded: str) -> Hash:
    """Create a hash of the same kind as the digest ``recorded``."""
    return hashlib.sha256() if recorded.startswith(PLAIN) else Digest()


class Digest:
    """The digest of pieces; independent of how the data is split between updates."""

    def __init__(self) -> None:
        self._of_pieces = hashlib.sha256()
        self._rest = b""

    def update(self, data: bytes) -> None:
        """Add ``data``."""
        whole = self._rest + data if self._rest else data
        end = len(whole) - len(whole) % PIECE_BYTES
        for at in range(0, end, PIECE_BYTES):
            self._add(whole[at : at + PIECE_BYTES])
        self._rest = whole[end:]

    def hexdigest(self) -> str:
        """Return the digest; no update may follow."""
        if self._rest:
            self._add(self._rest)
        self._rest = b""
        return self._of_pieces.hexdigest()

    def _add(self, piece: bytes) -> None:
        self._of_pieces.update(_of_zeros() if piece == _ZEROS else hashlib.sha256(piece).digest())


@cache
def _of_zeros() -> bytes:
    return hashlib.sha256(_ZEROS).digest()


def read(fd: int) -> Iterator[bytes]:
    """Yield the content of an open file in pieces, without reading holes."""
    size, at = os.fstat(fd).st_size, 0
    for start, end in data_ranges(fd, size):
        while at + PIECE_BYTES <= start:
            yield _ZEROS
            at += PIECE_BYTES
        while at < end:
            data = os.pread(fd, PIECE_BYTES, at)
            if not data:  # truncated meanwhile
                return
            yield data
            at += len(data)
    while at < size:
        zeros = _ZEROS[: size - at]
        yield zeros
        at += len(zeros)
