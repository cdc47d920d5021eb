"""A clone takes the place of the file it was made for, or that file is as it was."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

import pytest

import clonefile
from ovm.disks import copying
from ovm.disks.install import prepare
from ovm.model.options import OriginPath, Versions
from ovm.trust.atomic import TEMPORARY_PREFIX, NewFile

NAMES = ("gvproxy", "kernel", "initrd", "rootfs")
CONTENT = os.urandom(200_000)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return clonefile.build(tmp_path_factory.mktemp("clonefile"))


@pytest.fixture
def by_name(library, monkeypatch) -> None:
    """This system clones as macOS does."""
    monkeypatch.setattr(copying, "_libc", lambda: ctypes.CDLL(os.fspath(library), use_errno=True))
    monkeypatch.setitem(copying._CLONERS, sys.platform, copying.clone_by_name)


@pytest.fixture
def origin(tmp_path) -> Path:
    path = tmp_path / "origin"
    path.write_bytes(CONTENT)
    path.chmod(0o444)
    return path


@pytest.fixture
def new(tmp_path):
    (tmp_path / "target").mkdir()
    file = NewFile(tmp_path / "target", "kernel")
    yield file
    file.discard()


def clone(origin: Path, new: NewFile) -> bool:
    source = os.open(origin, os.O_RDONLY)
    try:
        return copying.clone(source, new.fd, new.path)
    finally:
        os.close(source)


@pytest.mark.usefixtures("by_name")
def test_a_clone_is_what_the_new_file_is_open_on(origin, new):
    """So it is sealed and placed like any other, and what is written to it later is its own."""
    assert clone(origin, new)
    assert os.fstat(new.fd).st_ino == new.path.stat().st_ino
    assert not os.get_inheritable(new.fd)
    new.seal(0o755)
    target = new.path.with_name("kernel")
    new.place(target)
    assert target.read_bytes() == CONTENT
    assert target.stat().st_mode & 0o777 == 0o755
    assert origin.stat().st_mode & 0o777 == 0o444
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EXDEV, errno.EACCES, errno.ENOSPC])
def test_where_it_cannot_be_nothing_has_changed(origin, new, monkeypatch, number):
    monkeypatch.setenv("CLONE_ERRNO", str(number))
    before = os.fstat(new.fd)
    assert not clone(origin, new)
    assert new.path.stat().st_ino == before.st_ino
    assert list(new.path.parent.iterdir()) == [new.path]


@pytest.mark.usefixtures("by_name")
def test_a_locked_file_is_unlocked_by_its_clone(origin, new, monkeypatch):
    unlocked = []
    monkeypatch.setattr(os, "chflags", lambda path, flags: unlocked.append((path.name, flags)), raising=False)
    assert clone(origin, new)
    assert unlocked == [(new.path.name + ".clone", 0)]


@pytest.mark.usefixtures("by_name")
def test_a_clone_that_cannot_be_used_is_removed(origin, new, monkeypatch):
    def refuse(path, flags):
        raise PermissionError

    monkeypatch.setattr(os, "chflags", refuse, raising=False)
    assert not clone(origin, new)
    assert list(new.path.parent.iterdir()) == [new.path]


def test_a_system_that_cannot_clone_copies(origin, new, monkeypatch):
    monkeypatch.setattr(copying, "_CLONERS", {})
    assert not clone(origin, new)


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize("clones", [True, False])
async def test_files_are_made_either_way(tmp_path, monkeypatch, clones):
    """No byte is copied where files can be cloned; a refusal is as good as another system."""
    (tmp_path / "origins").mkdir()
    origins = OriginPath(**{name: tmp_path / "origins" / name for name in NAMES})
    for path in origins.named().values():
        path.write_bytes(CONTENT)
    if clones:
        monkeypatch.setattr(copying, "copy", lambda *_: pytest.fail("a byte was copied"))
    else:
        monkeypatch.setenv("CLONE_ERRNO", str(errno.ENOTSUP))
    target = tmp_path / "target"
    files = await prepare(origins, Versions(**dict.fromkeys(NAMES, "1")), target)
    assert {path.name: path.stat().st_mode & 0o777 for path in target.iterdir()} == {
        "gvproxy": 0o755, "kernel": 0o644, "initrd": 0o644, "rootfs": 0o644,
        "versions.json": 0o644, "digests.json": 0o644
    }  # fmt: skip
    assert files.rootfs.read_bytes() == files.gvproxy.read_bytes() == CONTENT
    assert not list(target.glob(TEMPORARY_PREFIX + "*"))
