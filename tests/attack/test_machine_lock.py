"""Something that is no lock file lies where a machine's lock belongs (B11)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ovm.errors import FileError, InUseError
from ovm.paths import LOCK
from ovm.process import lock


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_link(path: Path) -> None:
    path.with_name("precious").write_text("precious")
    path.symlink_to("precious")


@pytest.mark.parametrize(
    "make",
    [make_socket, os.mkfifo, make_link, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(LOCK)],
    ids=["socket", "pipe", "link", "broken link", "loop"],
)
async def test_what_is_no_lock_file_is_replaced(short_path: Path, make: Callable[[Path], None]) -> None:
    """B11: it does not block a start, and what a link leads to stays as it is."""
    make(short_path / LOCK)
    async with lock.hold([short_path], wait_s=0):
        assert (short_path / LOCK).is_file()
        assert not (short_path / LOCK).is_symlink()
        with pytest.raises(InUseError):
            async with lock.hold([short_path], wait_s=0):
                pass
    if (short_path / "precious").exists():
        assert (short_path / "precious").read_text() == "precious"


async def test_a_directory_in_place_of_a_lock_is_told(short_path: Path) -> None:
    """B11: it may hold files, so a person is asked to remove it."""
    (short_path / LOCK).mkdir()
    with pytest.raises(FileError) as caught:
        async with lock.hold([short_path], wait_s=0):
            pass
    assert caught.value.hint == f"remove {short_path / LOCK}"


async def test_a_lock_that_is_held_is_never_replaced(short_path: Path) -> None:
    """B11: a regular file of ours stays, whoever holds it."""
    async with lock.hold([short_path], wait_s=0):
        held = (short_path / LOCK).stat()
        with pytest.raises(InUseError):
            async with lock.hold([short_path], wait_s=0):
                pass
        assert os.path.samestat((short_path / LOCK).stat(), held)
