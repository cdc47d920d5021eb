"""Download a released image and replace the existing one.

All work happens in ``.NAME.pulling`` beside the target. A lost connection, Ctrl-C or a kill leaves a partial download
there, which the next pull resumes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import get_args

from ovm import paths
from ovm.errors import ImageError, InUseError, OptionError
from ovm.image.build import host_arch
from ovm.image.download import PARTIAL, Wanted, discard, download, url_complaint
from ovm.image.images import Arch, GuestImage, load_image
from ovm.image.index import released_image
from ovm.image.place import check_target, into_place
from ovm.image.release import unpack_release
from ovm.process.threads import in_thread
from ovm.trust import directories
from ovm.trust.atomic import disk_errors
from ovm.trust.locks import try_lock

PullProgress = Callable[[str, int, int], object]
"""Called in the event loop with ``download`` or ``unpack``, the bytes done and the total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """The release to download, and the image's directory."""

    url: str = ""
    """URL of a release made by ``ovm image pack``; by default the one released with this package."""
    arch: Arch = field(default_factory=host_arch)
    output: Path | None = None
    """The image's directory; by default the one that ovm starts machines from."""
    sha256: str = ""
    """SHA-256 of the release at ``url``, in hex digits. Without it, https is trusted and plain http refused."""

    def __post_init__(self) -> None:
        if self.arch not in get_args(Arch):
            raise OptionError(f"there is no guest for the architecture {self.arch!r}", hint="use amd64 or arm64")
        if self.sha256 and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise OptionError(f"{self.sha256!r} is not a SHA-256", hint="give 64 lowercase hex digits")
        if self.sha256 and not self.url:
            raise OptionError(
                "a SHA-256 was given without a URL",
                hint="give a URL, or leave the SHA-256 out: ovm knows that of its own release",
            )
        if self.url and (why := url_complaint(self.url, has_digest=bool(self.sha256))):
            raise OptionError(f"the URL cannot be used: {why}", hint="use https, or give the release's SHA-256")


async def pull_image(options: PullOptions, *, progress: PullProgress | None = None) -> GuestImage:
    """Download a released image and replace the existing one.

    If it fails or is cancelled, the existing image stays. At most ``.NAME.pulling`` with the partial download remains
    beside it, for the next pull.

    Raises:
        ImageError: there is no such release, it cannot be downloaded, or is damaged.
        InUseError: another pull to the same directory runs.
        SpaceError: the file system has too little space.
        FileError: the directory cannot be written to.
    """
    report = progress or (lambda _stage, _done, _total: None)
    target = paths.expanded(options.output or paths.images_dir() / f"default-{options.arch}").absolute()
    check_target(target)
    wanted, room = _wanted(options)
    with disk_errors(f"{target} cannot be written"):
        async with _workspace(target) as work:
            release = await download(wanted, work, room=room, progress=partial(report, "download"))
            try:
                await _unpack(release, work / "image", options.arch, report)
            except ImageError:
                discard(work)
                raise
            await in_thread(partial(into_place, work / "image", target))
            discard(work)
    return load_image(target)


def _wanted(options: PullOptions) -> tuple[Wanted, int]:
    if options.url:
        return Wanted(url=options.url, sha256=options.sha256), 0
    release = released_image(options.arch)
    return Wanted(url=release.url, sha256=release.sha256, size=release.size), release.unpacked


async def _unpack(release: Path, image: Path, arch: Arch, report: PullProgress) -> None:
    loop, stop = asyncio.get_running_loop(), Event()

    def tell(done: int, total: int) -> None:
        if stop.is_set():
            raise _StoppedError
        loop.call_soon_threadsafe(report, "unpack", done, total)

    await in_thread(partial(unpack_release, release, image, arch, tell), stop)


class _StoppedError(Exception):
    """The unpacking was cancelled."""


@contextlib.asynccontextmanager
async def _workspace(target: Path) -> AsyncIterator[Path]:
    """Create and lock a directory beside the target; only a partial download stays in it."""
    directories.make(target.parent)
    work = target.with_name(f".{target.name}.pulling")
    lock = _lock(work)
    try:
        await in_thread(partial(_tidy, work, target))
        try:
            yield work
        finally:
            await in_thread(partial(_tidy, work, target))
            if not (work / PARTIAL).exists():
                shutil.rmtree(work)
    finally:
        os.close(lock)


def _tidy(work: Path, target: Path) -> None:
    if (work / "old").exists() and not target.exists():  # killed between the two steps of an exchange
        (work / "old").rename(target)
    for name in ("image", "old"):
        shutil.rmtree(work / name, ignore_errors=True)


def _lock(work: Path) -> int:
    """Own ``work``. Not in a thread: cancelled meanwhile, the caller would never release the lock."""
    while True:
        work.mkdir(mode=0o700, exist_ok=True)
        path = work / paths.LOCK
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # the previous owner has just removed it
            continue
        try:
            if not try_lock(fd):
                raise InUseError(f"{work} is in use by another pull of the same image", hint="wait for that pull")
            if os.path.samestat(os.fstat(fd), path.stat()):  # else its owner removed it before it was locked here
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
