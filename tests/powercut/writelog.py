"""A disk's writes as QEMU's blklogwrites filter logs them, and the disks a power cut may leave.

The log is that of the kernel's dm-log-writes: a super block, and for each operation an entry, each a sector long, with
the data of a write behind its entry. QEMU logs a write once it is done and before the guest is told so. A flush is
logged when it is asked for: nothing below the filter flushes, so that a write is before a flush in the log only if it
was done by then.
"""

from __future__ import annotations

import bisect
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

SECTOR = 512
MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD = 1, 2, 4
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True, slots=True)
class Operation:
    """One entry of the log."""

    at: int
    """Where in the log it begins."""
    sector: int
    sectors: int
    flags: int

    @property
    def data_at(self) -> int:
        """Where in the log its data are, if it is a write."""
        return self.at + SECTOR

    @property
    def ends_at(self) -> int:
        """Where in the log the next one begins."""
        return self.data_at + (0 if self.flags & DISCARD else self.sectors * SECTOR)


@dataclass(frozen=True, slots=True)
class Cut:
    """The power fails behind so many operations."""

    position: int
    survives: float
    """How likely a sector is to be kept that no flush has made durable; half of what is lost is torn."""
    seed: int = 0


class WriteLog:
    """A log that nobody writes to any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.operations = list(_operations(path))
        self._begins = [operation.at for operation in self.operations]

    def position(self, size: int) -> int:
        """How many operations were logged when the log had ``size`` bytes."""
        return bisect.bisect_left(self._begins, size)

    def flushed(self, position: int) -> int:
        """How many of the first ``position`` operations a flush among them has made durable."""
        return next((at for at in range(position, 0, -1) if self.operations[at - 1].flags & FLUSH), 0)

    def next_flush(self, position: int) -> int:
        """How many operations are before the first flush behind ``position`` of them; all if none is."""
        count = len(self.operations)
        return next((at for at in range(position, count) if self.operations[at].flags & FLUSH), count)

    def data(self, operation: Operation) -> bytes:
        """What was written."""
        with self.path.open("rb", buffering=0) as log:
            return os.pread(log.fileno(), operation.sectors * SECTOR, operation.data_at)

    def find(self, words: bytes, within: range) -> list[int]:
        """Which writes carried ``words``."""
        return [at for at in within if not self.operations[at].flags and words in self.data(self.operations[at])]

    def rebuild(
        self, disk: Path, size: int, cut: Cut, *, durable: int | None = None, without: Sequence[int] = ()
    ) -> None:
        """Make ``disk``, which was empty when the log began, as the power cut may leave it.

        Args:
            disk: It is replaced.
            size: Its bytes.
            cut: When the power fails, and what luck has it.
            durable: How many operations are on the disk for certain, instead of those a flush stands behind.
            without: Operations to leave out, whatever stands behind them.
        """
        chance = Random(cut.seed)
        durable = self.flushed(cut.position) if durable is None else durable
        disk.unlink(missing_ok=True)
        with self.path.open("rb", buffering=0) as log, disk.open("xb", buffering=0) as file:
            disk.chmod(0o600)
            file.truncate(size)
            for at, operation in enumerate(self.operations[: cut.position]):
                if at not in without:
                    runs = [range(operation.sectors)]
                    if at >= durable and not operation.flags & FUA:
                        runs = _survivors(operation.sectors, cut.survives, chance)
                    for run in runs:
                        _apply(log.fileno(), file.fileno(), operation, run)


def _operations(path: Path) -> Iterator[Operation]:
    with path.open("rb") as log:
        magic, version, counted, sector_size = _SUPER.unpack(log.read(_SUPER.size))
        assert (magic, version, sector_size) == (MAGIC, 1, SECTOR), f"{path} is no log of writes"
        size, at, found = os.fstat(log.fileno()).st_size, SECTOR, 0
        while at < size:
            log.seek(at)
            sector, sectors, flags, _ = _ENTRY.unpack(log.read(_ENTRY.size))
            operation = Operation(at, sector, sectors, flags)
            assert not flags & ~(FLUSH | FUA | DISCARD), f"{path} is damaged at {at}"
            assert operation.ends_at <= size, f"{path} is cut"
            yield operation
            at, found = operation.ends_at, found + 1
        # the super block is written beside the entries and may come late, never early
        assert found >= counted, f"{path} counts {counted} operations and has {found}"


def _survivors(sectors: int, survives: float, chance: Random) -> list[range]:
    """Whole, torn or lost."""
    if survives and chance.random() < survives:
        return [range(sectors)]
    if survives and chance.random() < 0.5:
        return [range(at, at + 1) for at in range(sectors) if chance.random() < 0.5]
    return []


def _apply(log: int, disk: int, operation: Operation, run: range) -> None:
    at, count = (operation.sector + run.start) * SECTOR, len(run) * SECTOR
    if operation.flags & DISCARD:
        _zero(disk, at, at + count)
    elif count:
        data = os.pread(log, count, operation.data_at + run.start * SECTOR)
        assert os.pwrite(disk, data, at) == count


def _zero(disk: int, begin: int, end: int) -> None:
    """What is a hole already stays one."""
    while begin < end:
        try:
            data = os.lseek(disk, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        hole = min(os.lseek(disk, data, os.SEEK_HOLE), end)
        if data < hole:
            os.pwrite(disk, bytes(hole - data), data)
        begin = max(hole, data)
