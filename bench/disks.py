"""Unpacking and copying a root file system, as a create does it, beside the programs that do the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from bench import programs
from bench.samples import Measure, alternate, timed
from bench.setting import Bench, NotHereError
from ovm.disks import copying, install
from ovm.model.options import OriginPath, Versions
from ovm.registry.images import load_image

ROWS = (
    "unpack: ovm",
    "unpack: unzip",
    "unpack: bsdtar",
    "unpack: allocated / data",
    "copy: ovm",
    "copy: cp, then sync",
    "copy: ovm, not flushed",
    "copy: cp --sparse=always",
    "clone: ovm, btrfs",
)
ROOTFS = "rootfs.btrfs"
BLOCK_BYTES = 4096
MIB = 1 << 20
BTRFS_HEADROOM_MIB = 512


async def measure(bench: Bench) -> None:
    """All of it."""
    directory = bench.work / "disks"
    directory.mkdir()
    rootfs = await asyncio.to_thread(_rootfs, bench, directory)
    archive = await _archive(bench, rootfs)
    await _unpack(bench, rootfs, archive, directory)
    await _copy(bench, rootfs, directory)
    try:
        async with _btrfs(rootfs, directory) as mounted:
            await _clone(bench, rootfs, mounted)
    except NotHereError as error:
        bench.missing["clone: ovm, btrfs"] = str(error)
    await asyncio.to_thread(shutil.rmtree, directory)


async def _unpack(bench: Bench, rootfs: Path, archive: Path, directory: Path) -> None:
    bench.tell("unpacking the root file system")
    data = await asyncio.to_thread(_data_bytes, rootfs)
    target = directory / "out"

    async def ours() -> float:
        ms = await timed(_made(archive, target))
        allocated = (target / rootfs.name).stat().st_blocks * 512
        bench.recorder.add("unpack: allocated / data", allocated / data, "x")
        return ms

    unzip = programs.find("unzip", "unzip")
    sides: dict[str, Measure] = {
        "unpack: ovm": ours,
        "unpack: unzip": lambda: programs.time_of([unzip, "-q", archive, "-d", target]),
    }
    try:
        bsdtar = programs.find("bsdtar", "libarchive-tools")
        sides["unpack: bsdtar"] = lambda: programs.time_of([bsdtar, "-x", "-S", "-f", archive, "-C", target])
    except NotHereError as error:
        bench.missing["unpack: bsdtar"] = str(error)
    await _alternate(bench, sides, target)


async def _copy(bench: Bench, rootfs: Path, directory: Path) -> None:
    bench.tell("copying the root file system")
    target, known = directory / "out", _known(bench)
    sides: dict[str, Measure] = {
        "copy: ovm": lambda: timed(_made(rootfs, target, known)),
        "copy: cp, then sync": lambda: timed(_copied_and_synced(rootfs, target)),
        "copy: ovm, not flushed": lambda: timed(asyncio.to_thread(_copied, rootfs, target / rootfs.name)),
        "copy: cp --sparse=always": lambda: programs.time_of(["cp", "--sparse=always", rootfs, target]),
    }
    await _alternate(bench, sides, target)


def _copied(rootfs: Path, target: Path) -> None:
    """As ovm copies, and as ``cp`` leaves it: in memory, where a power failure takes it."""
    with rootfs.open("rb") as source, target.open("wb") as copied:
        size = os.fstat(source.fileno()).st_size
        for _ in copying.copy(source.fileno(), copied.fileno(), size):
            pass


async def _copied_and_synced(rootfs: Path, target: Path) -> None:
    """As a create leaves it: on the disk, not only on its way there."""
    await programs.run(["cp", "--sparse=always", rootfs, target], bound=False)
    await programs.run(["sync", target / rootfs.name], bound=False)


async def _clone(bench: Bench, rootfs: Path, mounted: Path) -> None:
    bench.tell("copying it on btrfs")
    origin = mounted / rootfs.name
    await programs.run(["cp", "--sparse=always", rootfs, origin])
    target, known = mounted / "out", _known(bench)
    await _alternate(bench, {"clone: ovm, btrfs": lambda: timed(_made(origin, target, known))}, target)


async def _alternate(bench: Bench, sides: dict[str, Measure], target: Path) -> None:
    """Each into an empty directory, with nothing of the others' left to be written."""
    fresh = {row: _into_fresh(side, target) for row, side in sides.items()}
    await alternate(fresh, bench.recorder, runs=bench.scale.runs, warm_ups=bench.scale.warm_ups)


def _into_fresh(side: Measure, target: Path) -> Measure:
    async def measure() -> float:
        await asyncio.to_thread(_empty, target)
        return await side()

    return measure


def _empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    os.sync()


async def _made(rootfs: Path, target: Path, known: Mapping[str, str] | None = None) -> None:
    """What a create does with its files, flushes included, and digests unless they are ``known``.

    The other three files are next to nothing.
    """
    small = target.parent / "small"
    if not small.exists():
        small.write_bytes(b"small")
    origins = OriginPath(gvproxy=small, kernel=small, initrd=small, rootfs=rootfs)
    versions = Versions(gvproxy="1", kernel="1", initrd="1", rootfs="1")
    await install.prepare(origins, versions, target, sha256=known or {})


def _known(bench: Bench) -> dict[str, str]:
    """As ``create_ovm`` knows it, by the image; of a part of it nobody knows any."""
    return {} if bench.scale.rootfs_mib else {"rootfs": load_image(bench.image).sha256["rootfs"]}


# What is unpacked and copied


def _rootfs(bench: Bench, directory: Path) -> Path:
    """The image's, or its first part."""
    whole = bench.image / ROOTFS
    if bench.scale.rootfs_mib is None:
        return whole
    part = directory / ROOTFS
    size = bench.scale.rootfs_mib * MIB
    with whole.open("rb") as source, part.open("wb") as target:
        target.truncate(size)
        target.write(source.read(size // 2))
    return part


async def _archive(bench: Bench, rootfs: Path) -> Path:
    """It, zipped; kept for the next run if it is the image's."""
    name, whole = f"{ROOTFS}.zip", bench.scale.rootfs_mib is None
    digest = load_image(bench.image).sha256["rootfs"][:16]
    given = bench.image / name
    kept = bench.cache / f"rootfs-{digest}" / name if whole else rootfs.with_name(name)
    for archive in (given, kept) if whole else ():
        if archive.exists():
            return archive
    bench.tell("packing the root file system, once")
    kept.parent.mkdir(exist_ok=True)
    part = kept.with_name(f".{name}.new")
    await programs.run(programs.python("-m", "zipfile", "-c", os.fspath(part), os.fspath(rootfs)))
    part.rename(kept)
    return kept


def _data_bytes(path: Path) -> int:
    """How much of a file is not blocks of zeros."""
    zeros = bytes(BLOCK_BYTES)
    with path.open("rb") as file:
        return sum(BLOCK_BYTES for block in iter(lambda: file.read(BLOCK_BYTES), b"") if block != zeros)


# A file system that shares blocks


@contextlib.asynccontextmanager
async def _btrfs(rootfs: Path, directory: Path) -> AsyncIterator[Path]:
    """An empty btrfs; unmounted on the way out."""
    if os.geteuid() != 0:
        raise NotHereError("a btrfs is mounted for it, which takes root")
    mkfs, mount = programs.find("mkfs.btrfs", "btrfs-progs"), programs.find("mount", "mount")
    image, mounted = directory / "btrfs.img", directory / "btrfs"
    mounted.mkdir()
    size = (await asyncio.to_thread(rootfs.stat)).st_size + BTRFS_HEADROOM_MIB * MIB
    await programs.run(["truncate", "-s", str(size), image])
    await programs.run([mkfs, "-q", image])
    with _unmounted(mounted):
        try:
            await programs.run([mount, "-o", "loop", image, mounted])
        except programs.ProgramError as error:
            raise NotHereError(f"a btrfs cannot be mounted: {str(error).splitlines()[-1]}") from error
        yield mounted


@contextlib.contextmanager
def _unmounted(mounted: Path) -> Iterator[None]:
    try:
        yield
    finally:  # not to be cancelled: a mount would stay
        if mounted.is_mount():
            subprocess.run(["umount", mounted], check=True, capture_output=True)
