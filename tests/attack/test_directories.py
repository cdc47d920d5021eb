"""Rows B1, B4, B5, B6: another user lays out, or exchanges, the way to a directory of ours."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ovm.errors import FileError, UntrustedError
from ovm.trust import directories


def private(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def test_a_directory_of_ours_is_opened(short_path):
    """What nobody else could have made or can change is used, through links of ours too."""
    (short_path / "deep").mkdir()
    (short_path / "link").symlink_to("deep")
    with directories.opened(short_path / "link") as fd:
        assert os.path.samestat(os.fstat(fd), (short_path / "deep").stat())


def test_what_is_missing_is_made_private(short_path):
    """Each directory on the way, whatever the umask."""
    before = os.umask(0)
    try:
        directories.make(short_path / "a" / "b")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (short_path / "a", short_path / "a" / "b")] == [0o700, 0o700]


def test_a_directory_of_ours_becomes_private(short_path):
    """If that was asked for."""
    (short_path / "open").mkdir(mode=0o755)
    directories.make(short_path / "open", private=True)
    assert stat.S_IMODE((short_path / "open").stat().st_mode) == 0o700


def everybody_writes(path: Path) -> Path:
    private(path).chmod(0o777)
    return path


def group_writes(path: Path) -> Path:
    private(path).chmod(0o770)
    os.chown(path, 0, 1)  # a group that has members besides us, for all we know
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories to others")
@pytest.mark.parametrize("weak", [everybody_writes, group_writes])
@pytest.mark.parametrize("below", ["", "ours", "ours/deep"])
def test_a_way_that_others_can_write_to_is_refused(short_path, weak, below):
    """The directory itself, and any above it; nothing is made."""
    way = weak(short_path / "weak")
    with pytest.raises(UntrustedError, match=str(way)):
        directories.make(way / below)
    assert list(way.iterdir()) == []


@pytest.mark.parametrize("below", ["", "ours", "ours/deep"])
def test_a_way_of_another_user_is_refused(short_path, stranger, below):
    """B4: a directory that they made, or one below it."""
    short_path.chmod(0o1777)
    theirs = short_path / "theirs"
    stranger.does(theirs.mkdir)
    with pytest.raises(UntrustedError, match="belongs to the user"):
        directories.make(theirs / below)
    assert list(theirs.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deep"])
def test_a_link_of_another_user_is_refused(short_path, stranger, below):
    """B1, B5: in a directory where everybody may make one, whatever it leads to."""
    short_path.chmod(0o1777)
    victims = private(short_path / "victims")
    victims.chmod(0o755)
    stranger.does((short_path / "link").symlink_to, victims)
    with pytest.raises(UntrustedError, match="is a link"):
        directories.make(short_path / "link" / below, private=True)
    assert list(victims.iterdir()) == []
    assert stat.S_IMODE(victims.stat().st_mode) == 0o755


def test_a_second_name_of_a_link_of_ours_is_refused(short_path):
    """Some systems let others give a link of ours a second name, in a directory where everybody may."""
    (short_path / "private").mkdir()
    link = short_path / "private" / "link"
    link.symlink_to("/")
    shared = private(short_path / "shared")
    shared.chmod(0o1777)
    os.link(link, shared / "ours", follow_symlinks=False)
    with pytest.raises(UntrustedError, match="is a link"):
        directories.check(shared / "ours")


def test_what_is_exchanged_during_the_look_is_never_followed(short_path, stranger):
    """B5: they exchange their directory and a link to ours, over and over; we never enter either."""
    short_path.chmod(0o1777)
    victims = private(short_path / "victims")
    contested = short_path / "contested"

    def exchange() -> None:
        contested.mkdir()
        contested.rmdir()
        contested.symlink_to(victims)
        contested.unlink()

    refused = 0
    with stranger.doing(exchange):
        for _ in range(300):
            try:
                directories.make(contested / "below")
            except FileError:  # it belongs to them, or was gone again
                refused += 1
            else:  # ours was there first, so it stays ours
                assert (contested / "below").stat().st_uid == os.geteuid()
                (contested / "below").rmdir()
                contested.rmdir()
    assert list(victims.iterdir()) == []
    assert refused


def test_links_without_an_end_are_refused(short_path):
    """As the kernel does."""
    (short_path / "a").symlink_to("b")
    (short_path / "b").symlink_to("a")
    with pytest.raises(UntrustedError, match="more than 40 links"):
        directories.check(short_path / "a")
