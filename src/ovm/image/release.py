"""Pack and unpack a release of an image: one zip with the files of its directory and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event

from ovm._version import __version__
from ovm.disks import copying
from ovm.errors import ImageError
from ovm.image.images import DESCRIPTION, FILE_NAMES, Arch, Description, read_description, sha256, verify_image
from ovm.image.place import check_space
from ovm.process.threads import in_thread
from ovm.trust import directories
from ovm.trust.atomic import NewFile, disk_errors, sync, sync_directory, write_whole

MANIFEST = "manifest"
MEMBERS = (DESCRIPTION, MANIFEST, *FILE_NAMES.values())
"""The files of a release; it must have exactly these."""

DESCRIPTION_MAX_BYTES = 1024 * 1024
FILE_MAX_BYTES = 4 * 1024**3

_PIECE_BYTES = 1024 * 1024
_FILE_MODE = 0o644
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""Errors that zipfile raises for truncated, corrupted, encrypted or unknown archives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A release on disk."""

    path: Path
    arch: Arch
    sha256: str
    size: int
    unpacked: int
    """Bytes the image takes on disk."""


async def pack_image(directory: Path, output: Path | None = None) -> Packed:
    """Pack an image as ``ovm-image-ARCH-VERSION.zip`` into ``output``, by default the working directory.

    Raises:
        ImageError: ``directory`` contains no complete image.
        SpaceError: the file system has too little space.
        FileError: the release cannot be written.
    """
    image = await verify_image(directory)
    path = (output or Path()).absolute() / f"ovm-image-{image.arch}-{__version__}.zip"
    stop = Event()
    with disk_errors(f"{path} cannot be created"):
        await in_thread(partial(_check_manifest, directory / MANIFEST, image.tree_sha256))
        await in_thread(partial(_pack, directory, path, stop), stop)
        return await in_thread(partial(inspect_release, path))


def inspect_release(path: Path) -> Packed:
    """Describe a release.

    Raises:
        ImageError: it is not a release.
    """
    with _opened(path) as archive:
        description = _description(archive)
    size = path.stat().st_size
    return Packed(path=path, arch=description.arch, sha256=sha256(path), size=size, unpacked=description.occupied)


def unpack_release(path: Path, directory: Path, arch: Arch, progress: Callable[[int, int], object]) -> None:
    """Unpack a release to an image's directory: every file durable and with its digest in ``image.json``.

    Raises:
        ImageError: it is not a release, is damaged, or is for another architecture.
        SpaceError: the file system has too little space.
        FileError: a file cannot be written.
    """
    with disk_errors(f"{directory} cannot be written"), _opened(path) as archive:
        description = _description(archive)
        if description.arch != arch:
            raise ImageError(
                f"the image is for {description.arch} instead of {arch}", hint=f"pull it with --arch {description.arch}"
            )
        check_space(directory.parent, description.occupied)
        digests = {FILE_NAMES[name]: description.files[name].sha256 for name in FILE_NAMES}
        digests[MANIFEST] = description.tree_sha256
        total = sum(archive.getinfo(name).file_size for name in digests)
        directory.mkdir()
        done = 0
        for name, digest in digests.items():
            for written in _extract(archive, name, directory / name, digest):
                progress(done + written, total)
            done += archive.getinfo(name).file_size
        write_whole(directory / DESCRIPTION, _read(archive, DESCRIPTION), _FILE_MODE)
        sync_directory(directory)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with contextlib.ExitStack() as stack:
        with _whole(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
        names = sorted(archive.namelist())
        if names != sorted(MEMBERS):
            raise ImageError(
                f"{path} is not a release of an image: it contains {', '.join(map(repr, names[:10])) or 'nothing'}",
                hint=f"pack it with ovm image pack: it must contain {', '.join(MEMBERS)} and nothing else",
            )
        for member in archive.infolist():
            if member.file_size > (DESCRIPTION_MAX_BYTES if member.filename == DESCRIPTION else FILE_MAX_BYTES):
                raise ImageError(f"{path} declares {member.file_size} bytes for {member.filename}, which is too much")
        yield archive


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise ImageError(f"{path} is not a complete zip archive: {error}", hint="download or pack it again") from error
    except OSError as error:  # a wrong offset in the archive makes seek fail; a bad disk makes reading fail
        raise ImageError(
            f"{path} cannot be read: {error.strerror or error}", hint="download or pack it again"
        ) from error


def _description(archive: zipfile.ZipFile) -> Description:
    description = read_description(_read(archive, DESCRIPTION), f"{DESCRIPTION} in {archive.filename}")
    for name, file in FILE_NAMES.items():
        size = archive.getinfo(file).file_size
        if size != description.files[name].size:
            raise ImageError(f"{file} in {archive.filename} has {size} bytes instead of {description.files[name].size}")
    return description


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    return b"".join(_pieces(archive, name))


def _pieces(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """Yield a file's content; never more than the archive's directory declares."""
    with contextlib.ExitStack() as stack:
        path = Path(archive.filename or "")
        with _whole(path):
            member = stack.enter_context(archive.open(name))
        while True:
            with _whole(path):
                piece = member.read(_PIECE_BYTES)
            if not piece:
                return
            yield piece


def _extract(archive: zipfile.ZipFile, name: str, target: Path, wanted: str) -> Iterator[int]:
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for piece in _pieces(archive, name):
            digest.update(piece)
            yield piece

    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    try:
        yield from copying.write(fd, archive.getinfo(name).file_size, hashed())
        os.fchmod(fd, _FILE_MODE)
        sync(fd)
    finally:
        os.close(fd)
    if digest.hexdigest() != wanted:
        raise ImageError(f"{name} in {archive.filename} is damaged: its SHA-256 is not the one in {DESCRIPTION}")


def _check_manifest(path: Path, wanted: str) -> None:
    if not path.exists() or sha256(path) != wanted:
        raise ImageError(f"{path} is not the one the image was built with", hint="build it again: ovm image build")


def _pack(directory: Path, path: Path, stop: Event) -> None:
    directories.make(path.parent)
    new = NewFile(path.parent, path.name)
    try:
        with open(new.fd, "w+b", closefd=False) as opened, zipfile.ZipFile(opened, "w") as archive:
            for name in MEMBERS:
                with (directory / name).open("rb") as source, archive.open(_entry(directory / name), "w") as member:
                    while not stop.is_set() and (piece := source.read(_PIECE_BYTES)):
                        member.write(piece)
        if not stop.is_set():
            new.seal(_FILE_MODE)
            new.place(path)
            sync_directory(path.parent)
    finally:
        new.discard()


def _entry(path: Path) -> zipfile.ZipInfo:
    status = path.stat()
    made = zipfile.ZipInfo(path.name, datetime.fromtimestamp(status.st_mtime, UTC).timetuple()[:6])
    made.file_size = status.st_size
    made.compress_type = zipfile.ZIP_DEFLATED
    made.external_attr = _FILE_MODE << 16
    return made
