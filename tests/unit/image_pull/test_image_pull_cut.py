"""Pulls that are cut off, by the network, the disk, a signal or a kill, and what the next one makes of it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys

import pytest

from ovm.errors import FileError, ImageError, InUseError, SpaceError
from ovm.image import PullOptions, pack_image, place, pull_image, release, verify_image
from ovm.image import download as downloading
from releases import (
    INTERRUPTED,
    MIB,
    SOON_S,
    beside,
    entry,
    fetch,
    interrupted,
    kept,
    make_image,
    version,
)

# Resumed


async def test_a_cut_is_resumed(web, packed, target):
    """Within one pull, from where it was cut, and only if it is still the same file."""
    web.cuts = [2 * MIB, MIB // 2]
    await fetch(web.url(), target, packed.sha256)
    await verify_image(target)
    assert web.asked("range") == [None, f"bytes={2 * MIB}-", f"bytes={2 * MIB + MIB // 2}-"]
    assert web.asked("if-range") == [None, '"one"', '"one"']


@pytest.mark.parametrize("known", [True, False])
async def test_the_next_pull_resumes(web, packed, target, known):
    """With a digest or by the server's validator."""
    digest = packed.sha256 if known else ""
    await interrupted(web, target, digest)
    await fetch(web.url(), target, digest)
    await verify_image(target)
    assert web.asked("range") == [f"bytes={2 * MIB}-"]
    assert beside(target) == []


async def test_last_modified_will_do(web, target):
    """For servers without tags."""
    web.validator = ("Last-Modified", "Sun, 22 Nov 2026 21:34:00 GMT")
    await interrupted(web, target)
    await fetch(web.url(), target)
    assert web.asked("if-range") == [web.validator[1]]


@pytest.mark.parametrize("validator", [None, ("ETag", 'W/"one"')])
async def test_a_digest_is_validator_enough(web, packed, target, validator):
    """What was begun may be another file only if nothing tells which it was."""
    web.validator = validator
    await interrupted(web, target, packed.sha256)
    await fetch(web.url(), target, packed.sha256)
    assert web.asked("range") == [f"bytes={2 * MIB}-"]
    assert web.asked("if-range") == [None]


async def test_without_digest_and_validator_it_begins_anew(web, target):
    """Nothing tells whether it is still the same file."""
    web.validator = None
    await interrupted(web, target)
    await fetch(web.url(), target)
    assert web.asked("range") == [None]


async def test_a_server_that_cannot_resume(web, packed, target):
    """It sends all of it again, and that is taken."""
    web.resumes = False
    web.cuts = [2 * MIB]
    await fetch(web.url(), target, packed.sha256)
    await verify_image(target)
    assert web.asked("range") == [None, f"bytes={2 * MIB}-"]


async def test_a_server_that_never_gets_further(web, target):
    """Attempts that bring nothing new are counted, even if each of them brings something."""
    web.resumes = False
    web.cuts = [2 * MIB] * 100
    with pytest.raises(ImageError, match="peer closed"):
        await fetch(web.url(), target)
    assert len(web.requests) == downloading.ATTEMPTS


async def test_another_file_meanwhile(web, target, tmp_path):
    """What had come is thrown away."""
    await interrupted(web, target)
    newer = await pack_image(make_image(tmp_path / "newer", versions={"podman": "6"}), tmp_path)
    web.content, web.validator = newer.path.read_bytes(), ("ETag", '"two"')
    await fetch(web.url(), target)
    await verify_image(target)
    assert version(target) == "6"


async def test_the_beginning_of_another_download(web, packed, target):
    """What another URL had brought is not taken for the beginning of this one."""
    await interrupted(web, target)
    await fetch(web.url("/other.zip"), target)
    assert web.asked("range") == [None]


async def test_a_resumed_range_that_is_another(web, packed, target):
    """An answer from elsewhere in the file is not appended."""
    await interrupted(web, target)
    note = target.parent / ".a.pulling" / "download.json"
    note.write_text(note.read_text().replace(str(packed.size), str(packed.size + 1)))
    await fetch(web.url(), target)
    await verify_image(target)
    assert web.asked("range") == [f"bytes={2 * MIB}-", None]


@pytest.mark.parametrize("note", ["", "{", '{"key": 1}', "\xff"])
async def test_a_damaged_note(web, target, note):
    """It is as if nothing had come."""
    await interrupted(web, target)
    (target.parent / ".a.pulling" / "download.json").write_bytes(note.encode("latin-1"))
    await fetch(web.url(), target)
    assert web.asked("range") == [None]


async def test_a_whole_download_is_not_fetched_again(web, target, monkeypatch):
    """No room to unpack: the next pull asks the server only whether it is still the same."""
    with monkeypatch.context() as patched:
        patched.setattr(release, "check_space", lambda *_: (_ for _ in ()).throw(SpaceError("full")))
        with pytest.raises(SpaceError):
            await fetch(web.url(), target)
    assert kept(target) == INTERRUPTED
    assert version(target) == "old"
    await fetch(web.url(), target)
    await verify_image(target)
    assert web.asked("if-none-match") == [None, '"one"']


# Room


async def test_no_room(web, packed, target, released, monkeypatch):
    """It is known before the first byte has come, for the download and what is unpacked of it."""
    released(entry(packed, web.url()))
    free = packed.size + packed.unpacked - 1
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": free}))
    seen: list[str] = []
    with pytest.raises(SpaceError, match="MiB free"):
        await pull_image(PullOptions(arch="amd64", output=target), progress=lambda stage, *_: seen.append(stage))
    assert seen == []
    assert beside(target) == []
    assert version(target) == "old"


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, SpaceError), (errno.EIO, FileError)])
async def test_a_disk_that_refuses(web, target, monkeypatch, number, kind):
    """While the download is written."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(downloading, "write_at", refuse)
    with pytest.raises(kind):
        await fetch(web.url(), target)
    assert version(target) == "old"


# Interrupted


async def test_cancelled_in_the_download(web, target):
    """What has come stays, even what was not yet written; the next pull goes on from there."""
    web.hangs, web.cuts = True, [2 * MIB + 5]
    come = asyncio.Event()

    def progress(_stage: str, done: int, _total: int) -> None:
        if done == 2 * MIB + 5:
            come.set()

    task = asyncio.create_task(fetch(web.url(), target, progress=progress))
    async with asyncio.timeout(SOON_S):
        await come.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert kept(target) == INTERRUPTED
    assert version(target) == "old"
    await fetch(web.url(), target)
    assert web.asked("range") == [None, f"bytes={2 * MIB + 5}-"]
    assert beside(target) == []


async def test_cancelled_while_unpacking(web, target):
    """What was unpacked goes, the download stays."""
    unpacking = asyncio.Event()
    task = asyncio.create_task(
        fetch(web.url(), target, progress=lambda stage, *_: unpacking.set() if stage == "unpack" else None)
    )
    async with asyncio.timeout(SOON_S):
        await unpacking.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert kept(target) == INTERRUPTED
    assert version(target) == "old"


async def test_killed(web, target):
    """SIGKILL in the middle of a download: the next pull goes on from there."""
    web.hangs, web.cuts = True, [2 * MIB + 5]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ovm"),
        *("image", "pull", web.url(), "--arch", "amd64", "-o", target),
    )
    partial = target.parent / ".a.pulling" / "download"
    try:
        async with asyncio.timeout(SOON_S):
            while not partial.exists() or not partial.stat().st_size:
                await asyncio.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    had = partial.stat().st_size
    await fetch(web.url(), target)
    await verify_image(target)
    assert web.asked("range") == [None, f"bytes={had}-"]
    assert beside(target) == []


async def test_killed_while_unpacking(web, target):
    """What it had unpacked is swept away."""
    left = target.parent / ".a.pulling" / "image"
    left.mkdir(parents=True)
    (left / "kernel").write_bytes(b"half")
    await fetch(web.url(), target)
    await verify_image(target)
    assert beside(target) == []


async def test_killed_between_two_renames(web, target):
    """Where directories cannot be exchanged the old image is for a moment elsewhere: it comes back."""
    work = target.parent / ".a.pulling"
    work.mkdir()
    target.rename(work / "old")
    web.statuses = [404]
    with pytest.raises(ImageError, match="404"):
        await fetch(web.url(), target)
    assert version(target) == "old"


async def test_a_file_system_that_cannot_exchange(web, target, monkeypatch):
    """Two steps instead of one lead to the same."""
    monkeypatch.setattr(place, "_exchange", lambda *_: False)
    await fetch(web.url(), target)
    await verify_image(target)
    assert beside(target) == []


async def test_two_at_once(web, target):
    """The second one is told so; the first one is not disturbed."""
    web.hangs, web.cuts = True, [2 * MIB]
    begun = asyncio.Event()
    task = asyncio.create_task(fetch(web.url(), target, progress=lambda *_: begun.set()))
    async with asyncio.timeout(SOON_S):
        await begun.wait()
    with pytest.raises(InUseError, match="another pull"):
        await fetch(web.url(), target)
    web.over.set()
    await task
    await verify_image(target)
    assert beside(target) == []
