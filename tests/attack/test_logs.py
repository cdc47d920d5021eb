"""B9 and B10: logs that a guest, or a helper that it broke into, makes as large and as odd as it likes."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

import soak
from ovm.process import logs
from ovm.process.logcap import kept_small

MIB = 1024 * 1024
SIZE_MIB = 400
MEMORY_MAX_BYTES = 4 * MIB
SLACK_BYTES = MIB


def line(file: BinaryIO) -> None:
    file.writelines(b"x" * MIB for _ in range(soak.times(SIZE_MIB)))


def newlines(file: BinaryIO) -> None:
    file.writelines(b"\n" * MIB for _ in range(soak.times(SIZE_MIB)))


def hole(file: BinaryIO) -> None:
    file.seek(SIZE_MIB * MIB)


def peak(read: Callable[[], object]) -> int:
    """The most memory that ``read`` took, in bytes."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read_all(path: Path, lines: int) -> list[str]:
    """The last 100 of what ``ovm logs`` shows."""
    last: list[str] = []
    with logs.Reader(path, lines) as reader:
        while more := reader.more():
            last = [*last, *more][-100:]
        return [*last, *reader.rest()]


@pytest.mark.soak
@pytest.mark.parametrize("lines", [1, 100, 50_000])
@pytest.mark.parametrize("fill", [line, newlines, hole])
def test_an_odd_log_takes_little_memory(tmp_path, fill, lines):
    """B10: a log of one endless line, of newlines or of a hole is read with a few MB, and its end is shown."""
    path = tmp_path / "console.log"
    with path.open("wb") as file:
        fill(file)
        file.write(b"end\n")
    seen: list[str] = []
    assert peak(lambda: seen.extend(read_all(path, lines))) < MEMORY_MAX_BYTES
    assert seen[-1].endswith(logs.LINE_CUT if fill is line else "end")
    assert max(map(len, seen)) <= logs.LINE_MAX_BYTES + len(logs.LINE_CUT)
    assert peak(lambda: logs.tail(path)) < MEMORY_MAX_BYTES
    assert logs.tail(path)[-1].endswith("end")


def test_a_line_that_grows_for_ever_takes_little_memory(tmp_path):
    """B10: whoever follows a log holds no more of its unfinished line than is shown of it, and is told it once."""
    path = tmp_path / "console.log"
    path.touch()
    with path.open("ab", buffering=0) as log, logs.Reader(path, 10) as reader:

        def follow() -> None:
            for _ in range(soak.times(SIZE_MIB) // 4):
                log.write(b"x" * MIB)
                assert reader.more() == []

        assert peak(follow) < MEMORY_MAX_BYTES
        log.write(b"\nnext\n")
        assert reader.more() == ["x" * logs.LINE_MAX_BYTES + logs.LINE_CUT, "next"]


def room(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture(params=[os.O_APPEND, 0], ids=["appends", "keeps its place"])
def writer(request, tmp_path) -> Iterator[BinaryIO]:
    """Who writes console.log: QEMU and helpers append; vfkit keeps a place of its own."""
    path = tmp_path / "console.log"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | request.param, 0o600), "wb", buffering=0) as file:
        yield file


async def flood(writer: BinaryIO, name: str) -> None:
    """Eight MiB more than a log may have."""
    for _ in range(logs.SIZE_MAX_BYTES // MIB + 8):
        writer.write(f"{name}\n".encode() * (MIB // (len(name) + 1)))
        await asyncio.sleep(0)


async def test_a_log_that_is_flooded_stays_small(tmp_path, writer):
    """B9: a log is cut while it is written, again and again; its end is kept, and what follows is behind it."""
    path = tmp_path / "console.log"
    async with kept_small([path, tmp_path / "not-there.log"], look_s=0.001), asyncio.timeout(10):
        for name in ("first", "second"):
            await flood(writer, name)
            while room(path) > logs.SIZE_MAX_BYTES:
                await asyncio.sleep(0.001)
    writer.write(b"\nafter\n")
    assert room(path) <= logs.SIZE_MAX_BYTES + SLACK_BYTES
    assert logs.tail(path)[-1] == read_all(path, 3)[-1] == "after"
    with path.open("rb") as file:
        assert file.readline().startswith(b"[ovm: this log was too large")
        assert file.readline() in {b"first\n", b"second\n"}


async def test_whoever_reads_a_log_reads_on_when_it_is_cut(tmp_path, writer):
    """B9: a log that is cut is followed, and looked through for a panic since a place that is gone."""
    path = tmp_path / "console.log"
    await flood(writer, "noise")
    since = path.stat().st_size
    with logs.Reader(path, 1) as reader:
        assert reader.more() == ["noise"]
        assert logs.cut(path)
        assert not logs.cut(path)
        writer.write(b"Kernel panic - not syncing: noise\n")
        seen: list[str] = []
        while more := reader.more():
            seen += more
    assert seen[-1] == "Kernel panic - not syncing: noise"
    assert logs.tail(path, since=since)[-1] == "Kernel panic - not syncing: noise"


def test_a_log_of_one_endless_line_keeps_its_end(tmp_path):
    """B9: a log without a single line end is cut, too, and its end is kept."""
    path = tmp_path / "qemu.log"
    path.write_bytes(b"x" * (logs.SIZE_MAX_BYTES + MIB) + b"end")
    assert logs.cut(path)
    assert path.stat().st_size < logs.KEPT_BYTES + SLACK_BYTES
    assert path.read_bytes().endswith(b"xend")


def test_a_small_log_and_a_link_are_left_alone(tmp_path):
    """B9: what is no larger than it may be stays as it is, and a link in a log's place is not followed."""
    small, large, link = tmp_path / "gvproxy.log", tmp_path / "others", tmp_path / "guard.log"
    small.write_bytes(b"x" * MIB)
    large.write_bytes(b"x" * (logs.SIZE_MAX_BYTES + MIB))
    link.symlink_to(large)
    assert not logs.cut(small)
    with pytest.raises(OSError, match="symbolic"):
        logs.cut(link)
    assert (small.stat().st_size, large.stat().st_size) == (MIB, logs.SIZE_MAX_BYTES + MIB)
