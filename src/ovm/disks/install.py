"""Install the origin files in a machine's directory, copied or unpacked.

Each step is durable before the next begins. After a crash in step:

1. write all files under temporary names, also the records of steps 2, 3 and 4: the next run deletes them. Later steps
   only rename, so a full disk cannot interrupt them
2. drop the files to be replaced from versions.json (a forced run does this first, because it does not trust the files
   that it replaces): the next run replaces them again
3. rename the new files and digests.json: the next run replaces them again
4. record the new versions in versions.json

So a recorded version always matches the complete file and its digest, and step 3 is the first to replace a file.
Before a run builds on what a crashed run left, it syncs the directory; a power cut could otherwise undo that.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import BinaryIO

from ovm.disks import archive, copying, digest, kernel, plan, records
from ovm.disks.digest import Digest
from ovm.disks.records import Made, Records
from ovm.errors import FileError, SpaceError
from ovm.model.options import OriginPath, Versions
from ovm.paths import TargetPaths
from ovm.process.threads import ahead, in_thread
from ovm.trust.atomic import NewFile, disk_errors, sweep, sync_directory, write_at, write_whole

Progress = Callable[[str, int, int], object]
"""Called in the event loop with a file's name in ``versions``, the bytes done and the total bytes."""

Unpacker = Callable[[BinaryIO], Iterator[bytes]]
"""Yields the unpacked content of the opened origin, in pieces."""

PROGRAM_MODE = 0o755
FILE_MODE = 0o644

_MIB = 1024 * 1024
STAMP_S = 0.02
"""Two changes within this time may get equal timestamps: before 6.13, Linux took file times from its timer tick."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Paths of a machine's files, complete and of the requested version."""

    gvproxy: Path
    kernel: Path
    initrd: Path
    rootfs: Path
    vfkit: Path | None = None


async def prepare(
    origin: OriginPath,
    versions: Versions,
    target_dir: Path,
    *,
    sha256: Mapping[str, str] = MappingProxyType({}),
    force: bool = False,
    progress: Progress | None = None,
) -> Files:
    """Install every file in ``target_dir`` in its requested version; if one fails before publication, replace none.

    ``origin`` has passed ``plan.check_origins``; the caller holds the directory's lock. ``sha256`` holds the known
    digests of origins.

    Raises:
        SpaceError: the file system has too little free space.
        FileError: an origin changes during the copy, a packed kernel is damaged, or a file cannot be read or written.
        ArchiveError: the rootfs archive is damaged.
    """
    loop, stop = asyncio.get_running_loop(), Event()

    def go_on() -> None:
        if stop.is_set():
            raise _StoppedError

    def tell(name: str, done: int, total: int) -> None:
        go_on()
        if progress is not None:
            loop.call_soon_threadsafe(progress, name, done, total)

    batch = _Batch(origin, versions, TargetPaths(target_dir), sha256=sha256, tell=tell, go_on=go_on)
    try:
        await in_thread(partial(batch.begin, force=force), stop)
        await _at_once([work for copy in batch.copies for work in (copy.fill, copy.read)], stop)
        await in_thread(batch.stage)
        await _at_once(batch.flushes(), stop)  # concurrent flushes let the file system write all files together
        await in_thread(batch.publish)
    except BaseExceptionGroup as failed:
        first = failed.exceptions[0]
        raise first from first.__cause__
    finally:
        await in_thread(batch.discard)
    return Files(**batch.targets)


async def _at_once(works: Iterable[Callable[[], None]], stop: Event) -> None:
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(in_thread(work, stop))


class _StoppedError(Exception):
    """The copy was cancelled."""


@dataclass(slots=True)
class _Copy:
    """One file being copied."""

    item: plan.Item
    source: int
    before: os.stat_result
    new: NewFile
    size: int
    """Final size in bytes."""
    unpack: Unpacker | None
    """``None`` for a plain copy."""
    sha256: str | None
    """Digest of the origin, if known."""
    tell: Progress
    go_on: Callable[[], None]
    """Raises if the copy was cancelled."""
    cloned: bool = False
    done: int = 0
    """Bytes written so far."""
    digest: Digest = field(default_factory=Digest)

    def begin(self) -> None:
        """Share the blocks of the origin where possible; that needs no space."""
        self.cloned = self.unpack is None and copying.clone(self.source, self.new.fd, self.new.path)

    def fill(self) -> None:
        """Write the whole file."""
        with self._disk_errors():
            for done in copying.written_early(self.new.fd, self._steps()):
                self.done = done
                self.tell(self.item.name, done, self.size)

    def flush(self) -> None:
        """Make the file durable."""
        with self._disk_errors():
            self.new.seal(PROGRAM_MODE if self.item.name in plan.HELPERS else FILE_MODE)

    def read(self) -> None:
        """Hash the origin of a plain copy: :meth:`fill` does not see its data. Takes longer, so runs in parallel."""
        if self.unpack or self.sha256:
            return
        with disk_errors(f"{self.item.source} cannot be read"):
            for piece in digest.read(self.source):
                self.go_on()
                self.digest.update(piece)

    def check_unchanged(self) -> None:
        """Reject the copy if the origin has changed since it was opened."""
        try:
            after = _identity(self.item.source.stat())
        except OSError:
            after = None
        if self.done != self.size or after != _identity(self.before):
            raise FileError(
                f"{self.item.source} changed during the copy; no file was replaced",
                hint="try again once it is complete",
            )

    def made(self, version: str) -> Made:
        """Return the record of the file."""
        known = self.sha256 if not self.unpack else None
        taken = digest.PLAIN + known if known else self.digest.hexdigest()
        return Made(file=self.item.target, version=version, size=self.size, digest=taken)

    def most_room(self) -> int:
        """Return the most bytes of disk space that the file can take; holes take none."""
        if self.cloned:
            return 0
        return self.size if self.unpack else min(self.before.st_blocks * 512, self.size)

    def room(self) -> int:
        """Return the bytes of disk space that the file takes; unpacks a packed origin to find out."""
        if not self.unpack:
            return self.most_room()
        needed = 0
        for _, data in copying.data_runs(self._pieces(self.unpack)):
            needed += len(data)
            self.tell(self.item.name, 0, self.size)
        return needed

    def discard(self) -> None:
        os.close(self.source)
        self.new.discard()

    def _steps(self) -> Generator[int, None, None]:
        if self.cloned:
            yield self.size
        elif self.unpack:
            with closing(ahead(self._pieces(self.unpack))) as pieces:
                yield from copying.write(self.new.fd, self.size, self._digested(pieces))
        else:
            yield from copying.copy(self.source, self.new.fd, self.size)

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(f"{self.item.source} cannot be copied to {self.new.path.parent}")

    def _pieces(self, unpack: Unpacker) -> Generator[bytes, None, None]:
        with open(self.source, "rb", closefd=False) as opened:
            yield from unpack(opened)

    def _digested(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self.digest.update(piece)
            yield piece


class _Batch:
    """The files to replace, from the plan to the record in versions.json."""

    def __init__(
        self,
        origin: OriginPath,
        versions: Versions,
        target: TargetPaths,
        *,
        sha256: Mapping[str, str],
        tell: Progress,
        go_on: Callable[[], None],
    ) -> None:
        self.origins, self.wanted, self.target = origin.named(), versions.named(), target
        self.sha256 = sha256
        self.tell, self.go_on = tell, go_on
        self.targets = {n: target.directory / plan.target_name(n, path) for n, path in self.origins.items()}
        self.copies: list[_Copy] = []
        self._recorded = Records({}, {})
        self._records: dict[str, NewFile] = {}
        self._cleanup = ExitStack()

    def begin(self, *, force: bool) -> None:
        """Decide what to replace, open the origins, and check the free space."""
        directory = self.target.directory
        with disk_errors(f"{directory} cannot be used"):
            directory.mkdir(parents=True, exist_ok=True)
            sweep(directory)
            sync_directory(directory)
        for name, path in self.targets.items():
            if path.is_dir() and not path.is_symlink():
                raise FileError(f"{path} is a directory where {name} belongs", hint="move it away")
        self._recorded = records.load(self.target)
        there, names = plan.existing(self.targets), self._recorded.names()
        for item in plan.plan(self.origins, self.wanted, self._recorded.versions, there, names=names, force=force):
            with disk_errors(f"{item.source} cannot be copied to {directory}"):
                self.copies.append(self._opened(item))
        self._check_room()
        if force and self._kept() != self._recorded.versions:
            with disk_errors(f"{self.target.versions} cannot be written"):
                write_whole(self.target.versions, records.encode(self._kept()), FILE_MODE)
            self._recorded = Records(self._kept(), self._recorded.made)

    def stage(self) -> None:
        """Check that the origins have not changed, and write the records under temporary names."""
        if not self.copies:
            return
        for copy in self.copies:
            copy.check_unchanged()
        with self._disk_errors():
            if self._kept() != self._recorded.versions:
                self._stage("kept", self._kept())
            self._stage("digests", self._made())
            self._stage("versions", self._versions())

    def flushes(self) -> list[Callable[[], None]]:
        """Return the functions that make all files durable; call them in any order."""
        return [*(partial(self._flush, record) for record in self._records.values()), *(c.flush for c in self.copies)]

    def publish(self) -> None:
        """Rename the new files to their final names, and record their versions."""
        if not self.copies:
            return
        with self._disk_errors():
            if forget := self._records.get("kept"):
                forget.place(self.target.versions)
                sync_directory(self.target.directory)
            for copy in self.copies:
                copy.new.place(self.targets[copy.item.name])
            self._records["digests"].place(self.target.digests)
            sync_directory(self.target.directory)
            self._records["versions"].place(self.target.versions)
            sync_directory(self.target.directory)

    def discard(self) -> None:
        self._cleanup.close()

    def _opened(self, item: plan.Item) -> _Copy:
        with ExitStack() as undo:
            source = os.open(item.source, os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, source)
            before = _settled(source, item.source)
            size, unpack = _packed(item) or (before.st_size, None)
            new = NewFile(self.target.directory, item.name)
            undo.pop_all()
        copy = _Copy(item, source, before, new, size, unpack, self.sha256.get(item.name), self.tell, self.go_on)
        self._cleanup.callback(copy.discard)
        copy.begin()
        return copy

    def _check_room(self) -> None:
        room = os.statvfs(self.target.directory)
        available = room.f_bavail * room.f_frsize
        if not room.f_blocks or sum(copy.most_room() for copy in self.copies) <= available:
            return  # some network file systems do not report their free space
        needed = sum(copy.room() for copy in self.copies)
        if needed > available:
            names = ", ".join(copy.item.name for copy in self.copies)
            raise SpaceError(
                f"{names} need {-(-needed // _MIB)} MiB in {self.target.directory}, "
                f"{available // _MIB} MiB are available",
                hint="free disk space, or choose a target_dir on another disk",
            )

    def _kept(self) -> dict[str, str]:
        """Return the recorded versions of the files that are not replaced."""
        names = {copy.item.name for copy in self.copies}
        return {name: version for name, version in self._recorded.versions.items() if name not in names}

    def _versions(self) -> dict[str, str]:
        kept, names = self._kept(), {copy.item.name for copy in self.copies}
        of_now = {name: version for name, version in self.wanted.items() if name in names or name in kept}
        return {**of_now, **kept}

    def _made(self) -> dict[str, Made]:
        new = {copy.item.name: copy.made(self.wanted[copy.item.name]) for copy in self.copies}
        return {**self._recorded.made, **new}

    def _stage(self, name: str, record: Mapping[str, str | Made]) -> None:
        new = self._records[name] = NewFile(self.target.directory, name)
        self._cleanup.callback(new.discard)
        write_at(new.fd, records.encode(record), 0)

    def _flush(self, record: NewFile) -> None:
        with self._disk_errors():
            record.seal(FILE_MODE)

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(f"{self.target.directory} cannot be written to")


def _packed(item: plan.Item) -> tuple[int, Unpacker] | None:
    """Return the unpacked size of an origin and its unpacker; ``None`` if it is a plain file."""
    if plan.is_archive(item.name, item.source):
        member = archive.inspect(item.source)
        return member.size, partial(archive.inflate, member)
    if item.name == "kernel" and (packed := kernel.find_packed(item.source)):
        return kernel.unpacked_size(packed), partial(kernel.unpack, packed)
    return None


def _settled(source: int, path: Path) -> os.stat_result:
    """Return the status of an origin, long enough after its last change that a further one changes its timestamp."""
    status = os.fstat(source)
    if _is_fresh(status):
        time.sleep(STAMP_S)
        status = os.fstat(source)
    if _is_fresh(status):
        raise FileError(f"{path} is being written", hint="try again once it is complete")
    return status


def _is_fresh(status: os.stat_result) -> bool:
    return 0 <= time.time() - status.st_mtime < STAMP_S


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
