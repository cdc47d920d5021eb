"""What tests build once: whole or not at all, by one of those that want it, and not kept for ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

import built


def build(directory: Path, content: str = "built") -> bool:
    """Whether it had to be built."""
    with built.once(directory, "thing") as missing:
        if missing:
            with built.whole(directory) as new:
                new.mkdir()
                (new / "program").write_text(content)
        return missing


def test_it_is_built_once(tmp_path):
    """The second one that wants it gets what the first one built."""
    assert build(tmp_path / "thing-1", "first")
    assert not build(tmp_path / "thing-1", "second")
    assert (tmp_path / "thing-1" / "program").read_text() == "first"


def test_two_at_once_build_it_once(tmp_path):
    """The second one waits for the first one's build."""
    building, done = threading.Event(), threading.Event()

    def first() -> None:
        with built.once(tmp_path / "thing-1", "thing") as missing, built.whole(tmp_path / "thing-1") as new:
            assert missing
            new.mkdir()
            building.set()
            assert done.wait(10)

    def second() -> None:
        again.append(build(tmp_path / "thing-1"))

    again: list[bool] = []
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert building.wait(10)
    threads[1].start()
    assert not (tmp_path / "thing-1").exists()
    done.set()
    for thread in threads:
        thread.join()
    assert again == [False]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    """The next one builds it from nothing."""

    def fail() -> None:
        with built.once(tmp_path / "thing-1", "thing"), built.whole(tmp_path / "thing-1") as new:
            new.mkdir()
            (new / "half").touch()
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]
    assert build(tmp_path / "thing-1")


def test_old_ones_are_removed(tmp_path):
    """Those of other digests that no run has used for a day; what is in use by another checkout stays, as do others."""
    names = ("thing-old", "thing-recent", "other-old")
    for name in names:
        (tmp_path / name).mkdir()
        age_s = built.UNUSED_S + 60 if name.endswith("old") else 60
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    build(tmp_path / "thing-new")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"thing-new", "thing-recent", "other-old"}


def test_what_is_used_is_not_old(tmp_path):
    """A build that an old one's user has just taken is kept by the next run of another digest."""
    build(tmp_path / "thing-1")
    os.utime(tmp_path / "thing-1", (0, 0))
    build(tmp_path / "thing-1")
    build(tmp_path / "thing-2")
    assert (tmp_path / "thing-1").exists()
