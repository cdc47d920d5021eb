"""Rows B11, B14, B22: something else than a file of ours lies where a lock belongs."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ovm.errors import FileError
from ovm.trust.locks import open_lock


def a_link(path: Path) -> None:
    path.with_name("elsewhere").write_text("kept")
    path.symlink_to("elsewhere")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_socket(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.close()


def a_device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes devices")
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this root may make no device")


REPLACEABLE = [a_link, a_loop, a_socket, a_device, os.mkfifo]


@pytest.mark.parametrize("put", REPLACEABLE)
def test_what_cannot_carry_a_lock_is_replaced(short_path, put):
    """B11: a link, a pipe, a socket or a device in a lock's place makes way for a lock file; a link's target stays."""
    put(short_path / "lock")
    fd = open_lock(short_path / "lock", replace=True)
    try:
        status = (short_path / "lock").lstat()
        assert os.path.samestat(status, os.fstat(fd))
        assert (stat.S_ISREG(status.st_mode), stat.S_IMODE(status.st_mode)) == (True, 0o600)
    finally:
        os.close(fd)
    assert put is not a_link or (short_path / "elsewhere").read_text() == "kept"


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("put", [*REPLACEABLE, Path.mkdir])
def test_what_cannot_carry_a_lock_is_refused(short_path, put, create):
    """B14, B22: nothing is waited for, the error names what lies there, and it stays."""
    put(short_path / "lock")
    before = (short_path / "lock").lstat()
    with pytest.raises(FileError, match="instead of a lock file") as refused:
        open_lock(short_path / "lock", create=create)
    assert refused.value.hint == f"remove {short_path / 'lock'}"
    assert (short_path / "lock").lstat() == before


def test_a_directory_is_never_removed(short_path):
    """B22: even where others would be replaced."""
    (short_path / "lock").mkdir()
    with pytest.raises(FileError, match="is a directory"):
        open_lock(short_path / "lock", replace=True)


def test_a_second_name_is_refused(short_path):
    """It may be a file of another purpose, which the lock's owner would write into; or a lock that is held."""
    (short_path / "other").write_text("kept")
    os.link(short_path / "other", short_path / "lock")
    with pytest.raises(FileError, match="second hard link"):
        open_lock(short_path / "lock", replace=True)
    assert (short_path / "other").read_text() == "kept"


def test_a_lock_of_another_user_is_refused(short_path, stranger):
    """It may be held by that user, so it is not replaced either."""
    short_path.chmod(0o777)
    stranger.does((short_path / "lock").touch)
    with pytest.raises(FileError, match=f"the user with id {stranger.uid}"):
        open_lock(short_path / "lock", replace=True)
    assert (short_path / "lock").exists()


def test_a_missing_lock_is_told_from_a_bad_one(short_path):
    """Who only looks makes none."""
    with pytest.raises(FileNotFoundError):
        open_lock(short_path / "lock", create=False)
    assert list(short_path.iterdir()) == []


def test_those_who_replace_at_once_get_one_lock(short_path):
    """B11: of many who find a pipe there, none removes the lock file that another has made."""
    for attempt in range(20):
        path = short_path / f"lock{attempt}"
        os.mkfifo(path)
        with ThreadPoolExecutor(8) as threads:
            fds = list(threads.map(lambda _, path=path: open_lock(path, replace=True), range(8)))
        try:
            assert len({os.fstat(fd).st_ino for fd in fds}) == 1
            fcntl.flock(fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            for fd in fds:
                os.close(fd)
