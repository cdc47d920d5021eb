"""Check the given files before anything is changed, and decide which to replace. Only reads."""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovm.disks import archive, kernel
from ovm.errors import ArchiveError, FileError, HelperError, InputError, UnsupportedError
from ovm.model import architectures
from ovm.model.options import OriginPath
from ovm.paths import TargetPaths
from ovm.trust import directories
from ovm.trust.atomic import TEMPORARY_PREFIX

HELPERS = frozenset({"gvproxy", "vfkit"})
"""Origins that are programs."""

SECTOR_BYTES = 512
RECORD_MAX_BYTES = 64 * 1024
"""A larger versions.json or digests.json was not written by ovm."""

Reason = Literal["forced", "missing", "version", "name"]

_CPIO = (b"070701", b"070702")
_LZ4_FRAME = b"\x04\x22\x4d\x18"
_ZIP = b"PK\3\4"

_BTRFS_MAGIC = slice(0x10040, 0x10048)
_BTRFS_TOTAL_BYTES = slice(0x10070, 0x10078)
_BTRFS_HEAD_BYTES = 0x10078
_RESERVED = TargetPaths.names() | {".", ".."}


@dataclass(frozen=True, slots=True)
class Item:
    """A file to replace."""

    name: str
    """Its key in ``versions``."""
    source: Path
    target: str
    """Its name in ``target_dir``."""
    reason: Reason


def plan(
    origins: Mapping[str, Path],
    wanted: Mapping[str, str],
    recorded: Mapping[str, str],
    there: Collection[str],
    *,
    names: Mapping[str, str] | None = None,
    force: bool = False,
) -> list[Item]:
    """List the files to replace: all if forced, else the missing ones and those recorded with another version or name.

    ``there`` holds the keys whose target exists, ``names`` the known names of the recorded files. A recorded version
    describes the file of that name, not an older one that also exists.
    """

    def reason(name: str, target: str) -> Reason | None:
        if force:
            return "forced"
        if name not in there:
            return "missing"
        if recorded.get(name) != wanted.get(name):
            return "version"
        return "name" if (names or {}).get(name, target) != target else None

    items = ((name, path, target_name(name, path)) for name, path in origins.items())
    return [Item(name, path, target, why) for name, path, target in items if (why := reason(name, target))]


def recorded_versions(content: bytes) -> dict[str, str]:
    """Decode a versions.json; nothing if it is damaged or holds anything but strings by name."""
    import json

    if len(content) > RECORD_MAX_BYTES:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(version, str) for version in found.values()):
        return {}
    return found


def is_archive(name: str, path: Path) -> bool:
    """Return whether the origin ``name`` must be unpacked."""
    return name == "rootfs" and path.suffix.lower() == ".zip"


def target_name(name: str, path: Path) -> str:
    """Return the name of the origin ``name`` in ``target_dir``."""
    packed_kernel = name == "kernel" and path.suffix.lower() in kernel.SUFFIXES
    return path.stem if packed_kernel or is_archive(name, path) else path.name


def existing(targets: Mapping[str, Path]) -> set[str]:
    """Return the keys of ``targets`` that exist. Such files are complete, because ovm writes them atomically."""
    return {name for name, path in targets.items() if _is_whole(path)}


def check_origins(origin: OriginPath, *, arch: str | None = None, rootfs_must_be_btrfs: bool = True) -> None:
    """Reject files that no machine can use. ``arch`` is the guest's, by default this host's.

    Raises:
        FileError: a file is missing, unreadable, of the wrong kind or for another architecture.
        HelperError: a program is missing or not executable.
        ArchiveError: the rootfs archive is damaged, hostile or holds no image.
        UnsupportedError: ovm does not support this architecture.
    """
    origins = origin.named()
    for name, path in origins.items():
        _check_file(name, path)
    _check_target_names(origins)
    check_kernel(origin.kernel, arch or platform.machine())
    _check_initrd(origin.initrd)
    _check_rootfs(origin.rootfs, must_be_btrfs=rootfs_must_be_btrfs)


def check_directories(named: Mapping[str, Path]) -> None:
    """Reject directories, by option name, that are untrusted, not writable, or not directories.

    Raises:
        FileError: a path is not a directory, or not writable.
        UntrustedError: another user owns one, or could change it.
    """
    for name, directory in named.items():
        directories.check(directory)
        nearest = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise FileError(f"{name}: {nearest} is not a directory", hint="choose another, or move that file away")
        if not os.access(nearest, os.W_OK | os.X_OK):
            what = "be written to" if nearest == directory else f"be created: {nearest} is not writable"
            raise FileError(f"{name}: {directory} cannot {what}", hint="choose a directory that you own")


def check_kernel(path: Path, arch: str) -> None:
    """Reject a file that is not a bootable kernel for ``arch`` (a name from ``platform.machine()``), packed or not.

    Raises:
        FileError: it is not a kernel, is for another architecture, damaged, or packed in an unsupported way.
        UnsupportedError: ovm does not support ``arch``.
    """
    if (known := architectures.find(arch)) is None:
        raise UnsupportedError(f"ovm does not support {arch} guests", hint=f"use one of {', '.join(kernel.FORMS)}")
    wanted = known.kernel
    form = kernel.FORMS[wanted][2]
    head = _head(path, 4096)
    packed = kernel.find_packed(path)
    found = kernel.architecture(kernel.beginning(packed) if packed else head)
    if found and found != wanted:
        raise FileError(
            f"{path} is an {found} kernel, this host is {wanted}", hint=f"give the {wanted} kernel, a {form}"
        )
    if found and packed and wanted == "arm64":
        return
    if packing := kernel.packing(head):
        if packed and wanted == "arm64":
            raise FileError(f"{path} ({packing}) is damaged, or is not a kernel", hint="fetch or build it again")
        raise FileError(
            f"{path} is a kernel compressed with {packing}" if found else f"{path} is a compressed file ({packing})",
            hint=f"give the {form}, plain or compressed with gzip or zstd" if wanted == "arm64" else f"give the {form}",
        )
    if head[:4] == b"\x7fELF":
        raise FileError(f"{path} is an ELF file, perhaps a vmlinux", hint=f"give the {form} built from it")
    if not found:
        raise FileError(f"{path} is not a Linux kernel for {wanted}", hint=f"give a {form}")


def _check_file(name: str, path: Path) -> None:
    kind: type[InputError] = HelperError if name in HELPERS else FileError
    try:
        status = path.stat()
    except FileNotFoundError:
        what = "is a dangling symbolic link" if path.is_symlink() else "does not exist"
        raise kind(f"{name}: {path} {what}", hint="check the path") from None
    except OSError as error:
        raise kind(f"{name}: {path} cannot be read: {error.strerror}", hint="check the path") from error
    if stat.S_ISDIR(status.st_mode):
        raise kind(f"{name}: {path} is a directory", hint="give the file itself")
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would block forever
        raise kind(f"{name}: {path} is not a regular file", hint="give a file")
    if not status.st_size:
        raise kind(f"{name}: {path} is empty", hint="fetch or build it again")
    if not os.access(path, os.R_OK):
        raise kind(f"{name}: {path} is not readable for you", hint=f"run chmod u+r {path}")
    if name in HELPERS and not os.access(path, os.X_OK):
        raise HelperError(f"{name}: {path} is not executable", hint=f"run chmod +x {path}")


def _check_target_names(origins: Mapping[str, Path]) -> None:
    taken: dict[str, str] = {}
    for name, path in origins.items():
        target = target_name(name, path)
        key = target.casefold()  # macOS file systems ignore case
        if key in _RESERVED or key.startswith(TEMPORARY_PREFIX):
            raise FileError(f"{name}: {target} is a reserved file name", hint="rename it: ovm uses that name itself")
        if key in taken:
            raise FileError(
                f"{taken[key]} and {name} would both become {target}",
                hint="rename one: they are copied to the same directory",
            )
        taken[key] = name


def _check_initrd(path: Path) -> None:
    head = _head(path, 16)
    if head.startswith(_LZ4_FRAME):
        raise FileError(f"{path} uses an lz4 format that the kernel cannot unpack", hint="compress it with lz4 -l")
    if not head.startswith(_CPIO) and not kernel.compression(head):
        known = ", ".join(kernel.COMPRESSIONS.values())
        raise FileError(
            f"{path} is not an initrd", hint=f"give a cpio archive (newc), plain or compressed with {known}"
        )


def _check_rootfs(path: Path, *, must_be_btrfs: bool) -> None:
    kind: type[InputError]
    if is_archive("rootfs", path):
        member = archive.inspect(path)
        head, size, kind = _unpacked_head(member), member.size, ArchiveError
    else:
        head, size, kind = _head(path, _BTRFS_HEAD_BYTES), path.stat().st_size, FileError
        if head.startswith(_ZIP):
            raise FileError(f"{path} is a zip archive", hint=f"rename it to {path.name}.zip, so that ovm unpacks it")
    where = f"the file in {path}" if kind is ArchiveError else str(path)
    if size % SECTOR_BYTES:
        raise kind(
            f"{where} is {size} bytes long, not a multiple of {SECTOR_BYTES}",
            hint="fetch or build it again",
        )
    if not must_be_btrfs:
        return
    if head[_BTRFS_MAGIC] != b"_BHRfS_M":
        raise kind(
            f"{where} is not a btrfs file system",
            hint="give rootfs.btrfs, or a rootfs.btrfs.zip of it alone",
        )
    total = int.from_bytes(head[_BTRFS_TOTAL_BYTES], "little")
    if total > size:
        raise kind(f"{where} is truncated: {size} of {total} bytes", hint="fetch or build it again")


def _unpacked_head(member: archive.Member) -> bytes:
    pieces: list[bytes] = []
    with member.archive.open("rb") as source:
        for piece in archive.inflate(member, source):
            pieces.append(piece)
            if sum(map(len, pieces)) >= _BTRFS_HEAD_BYTES:
                break
    return b"".join(pieces)


def _head(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as opened:
            return opened.read(size)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error


def _is_whole(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0
