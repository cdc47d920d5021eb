"""A thread that works ahead hands over everything, its error too, and never outlives who takes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator

import pytest

from ovm.disks import copying
from ovm.process.threads import AHEAD, ahead

MANY = 10 * AHEAD
DEADLINE_S = 30.0


class Items:
    """Numbers, and what became of who makes them."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.made, self.ended = count, error, 0, False
        self.threads: set[int] = set()

    def __iter__(self) -> Generator[int, None, None]:
        try:
            for number in range(self.count):
                self.threads.add(threading.get_ident())
                self.made += 1
                yield number
            if self.error:
                raise self.error
        finally:
            self.ended = True


@pytest.mark.parametrize("count", [0, 1, MANY])
def test_all_items_come_in_order_from_another_thread(count):
    items, before = Items(count), threading.active_count()
    assert list(ahead(iter(items))) == list(range(count))
    assert items.ended
    assert threading.get_ident() not in items.threads
    assert threading.active_count() == before


def test_an_error_comes_after_the_items_before_it():
    taken = []
    with pytest.raises(OSError, match="damaged"):
        taken.extend(ahead(iter(Items(3, OSError("damaged")))))
    found = ahead(iter(Items(3, OSError("damaged"))))
    assert [next(found), next(found), next(found)] == [0, 1, 2]
    with pytest.raises(OSError, match="damaged"):
        next(found)


@pytest.mark.parametrize("taken", [1, AHEAD + 2])
def test_who_gives_up_ends_the_thread_though_it_waits(taken):
    items, before = Items(10**9), threading.active_count()
    found = ahead(iter(items))
    for _ in range(taken):
        next(found)
    found.close()
    assert items.ended
    assert items.made <= taken + AHEAD + 2
    assert threading.active_count() == before


def test_it_works_while_others_are_taken_and_not_too_far_ahead():
    """The first item has been taken, and nobody asks for the second: it is made all the same."""
    second = threading.Event()

    def made() -> Generator[int, None, None]:
        yield 1
        yield 2
        second.set()
        yield 3

    found = ahead(made())
    assert next(found) == 1
    assert second.wait(DEADLINE_S)
    assert list(found) == [2, 3]


@pytest.fixture
def begun(monkeypatch) -> list[tuple[int, int]]:
    """What the disk was told to begin on."""
    told: list[tuple[int, int]] = []
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot be told")
    advise = os.posix_fadvise

    def noted(fd: int, offset: int, count: int, advice: int) -> None:
        advise(fd, offset, count, advice)
        told.append((offset, offset + count))

    monkeypatch.setattr(os, "posix_fadvise", noted)
    return told


def test_the_disk_begins_on_what_is_written_before_all_is(tmp_path, begun):
    piece, count = 1024 * 1024, 20
    with (tmp_path / "file").open("w+b") as opened:
        pieces = (os.urandom(piece) for _ in range(count))
        steps = copying.write(opened.fileno(), count * piece, pieces)
        for done in copying.written_early(opened.fileno(), steps):
            assert all(end <= done for _, end in begun)
            assert done - (begun[-1][1] if begun else 0) < copying.CHUNK_BYTES + piece
    assert begun == [(0, copying.CHUNK_BYTES), (copying.CHUNK_BYTES, 2 * copying.CHUNK_BYTES)]


@pytest.mark.parametrize("how", ["missing", "refused"])
def test_a_system_that_cannot_begin_early_is_no_obstacle(tmp_path, monkeypatch, how):
    def refused(*_: int) -> None:
        raise OSError(22, "Invalid argument")

    if how == "missing":
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fadvise", refused, raising=False)
    content = os.urandom(copying.CHUNK_BYTES + 5)
    with (tmp_path / "file").open("w+b") as opened:
        assert list(copying.written_early(opened.fileno(), copying.write(opened.fileno(), len(content), [content])))
    assert (tmp_path / "file").read_bytes() == content
