"""What a power cut may leave of what a program did to its files: the operations recorded, the states enumerated.

The model promises less than any file system does. Until a directory is flushed, each name in it may be bound to
anything it was bound to since the last flush, whatever the other names are bound to: so creations, renames and removals
get lost and overtake each other, and after a rename both names may be there, or neither where there was no new one.
Of one thing it is sure, as rename(2) promises: a name that was replaced is the one file or the other, never nothing.
Until a file is flushed its content and mode may be those of the last flush or the latest, any blocks of it may be
missing (zeros) or wrong (what the disk held before), and it may be cut at any of its lengths. A flush of a file says
nothing of its name.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from unittest import mock

BLOCK = 4096
FICLONE = 0x40049409
RECORDED = ("open", "close", "mkdir", "pwrite", "copy_file_range", "ftruncate", "fchmod", "replace", "unlink", "fsync")
"""Of ``os``, which pathlib uses, too."""

Image = dict[str, tuple[bytes, int] | None]
"""A state of the disk: what each path holds and its mode; ``None`` for a directory."""


@dataclass(frozen=True)
class Op:
    """One operation. ``what`` is create, mkdir, write, truncate, chmod, rename, unlink, flush or flush-names."""

    what: str
    path: str
    """The file's name when it was first made, below the root."""
    file: int = 0
    """Which file; names come and go."""
    data: bytes = b""
    at: int = 0
    """An offset, a size, or a mode."""
    to: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.path}" + (f" -> {self.to}" if self.to else "")


@dataclass(frozen=True)
class _File:
    """Contents and modes since the last flush, that one first."""

    contents: tuple[bytes, ...]
    modes: tuple[int, ...]


@dataclass
class Disk:
    """The files below a root, as they are and as they may be after a power cut. ``None`` is a name bound to nothing."""

    files: dict[int, _File] = field(default_factory=dict)
    names: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    """What each path was bound to since its directory's last flush, that first. -1 is a directory."""

    def copy(self) -> Disk:
        return Disk(dict(self.files), dict(self.names))

    def apply(self, op: Op) -> None:
        """Do ``op``."""
        match op.what:
            case "create":
                self.files[op.file] = _File((b"",), (op.at,))
                self._bind(op.path, op.file)
            case "mkdir":
                self._bind(op.path, -1)
            case "write":
                old = self.files[op.file].contents[-1].ljust(op.at, b"\0")
                self._change(op.file, old[: op.at] + op.data + old[op.at + len(op.data) :])
            case "truncate":
                self._change(op.file, self.files[op.file].contents[-1][: op.at].ljust(op.at, b"\0"))
            case "chmod":
                file = self.files[op.file]
                self.files[op.file] = replace(file, modes=(*file.modes, op.at))
            case "rename":
                self._bind(op.to, self.names[op.path][-1])
                self._bind(op.path, None)
            case "unlink":
                self._bind(op.path, None)
            case "flush":
                file = self.files[op.file]
                self.files[op.file] = _File(file.contents[-1:], file.modes[-1:])
            case "flush-names":
                for path, bound in self.names.items():
                    if _above(path) == op.path:
                        self.names[path] = bound[-1:]

    def live(self) -> Image:
        """What a program sees."""
        return self._image(
            {path: bound[-1] for path, bound in self.names.items()}, lambda f: (f.contents[-1], f.modes[-1])
        )

    def crashed(self, rng: Random, most: int) -> Iterator[Image]:
        """States after a power cut: every combination of names, or ``most`` of them by chance; contents by chance."""
        choices = {path: tuple(dict.fromkeys(bound)) for path, bound in self.names.items()}
        total = 1
        for bound in choices.values():
            total *= len(bound)
        if total <= most:
            combinations: Iterator[tuple[int | None, ...]] = itertools.product(*choices.values())
        else:
            ends = [tuple(b[0] for b in choices.values()), tuple(b[-1] for b in choices.values())]
            by_chance = (tuple(rng.choice(b) for b in choices.values()) for _ in range(most))
            combinations = itertools.chain(ends, by_chance)
        for bound in combinations:
            for _ in range(2):
                image = self._image(dict(zip(choices, bound, strict=True)), lambda file: _torn(file, rng))
                yield image

    def _image(self, names, state) -> Image:
        image: Image = {}
        for path, bound in sorted(names.items()):
            above = _above(path)
            if bound is None or (above and above not in image):
                continue
            image[path] = None if bound == -1 else state(self.files[bound])
        return image

    def _bind(self, path: str, to: int | None) -> None:
        self.names[path] = (*self.names.get(path, (None,)), to)

    def _change(self, number: int, content: bytes) -> None:
        file = self.files[number]
        self.files[number] = replace(file, contents=(*file.contents, content))


def _above(path: str) -> str:
    return path.rpartition("/")[0]


def _torn(file: _File, rng: Random) -> tuple[bytes, int]:
    """One of the states a file may be in that has not been flushed."""
    mode = rng.choice(file.modes)
    if len(file.contents) == 1:
        return file.contents[0], mode
    durable, latest = file.contents[0], file.contents[-1]
    sizes = [len(content) for content in file.contents]
    how = rng.randrange(6)
    if how == 0:
        return durable, mode
    if how == 1:
        return latest, mode
    if how == 2:  # as far as it had come
        return latest[: rng.randint(min(sizes), max(sizes))], mode
    size = rng.choice(sizes)
    blocks = []
    for at in range(0, size, BLOCK):
        new = latest[at : at + BLOCK]
        old = durable[at : at + BLOCK].ljust(len(new), b"\0")
        if new == old:
            blocks.append(new)
        else:
            stale = b"\xa5" * len(new) if how == 5 else bytes(len(new))
            blocks.append(rng.choice([new, old, stale]))
    return b"".join(blocks)[:size].ljust(size, b"\0"), mode


def put(image: Image, root: Path) -> None:
    """Make ``root``, which is empty, look like ``image``."""
    for path, what in image.items():
        if what is None:
            (root / path).mkdir(0o700)
            continue
        content, mode = what
        with (root / path).open("wb") as opened:
            opened.write(content.rstrip(b"\0"))
            opened.truncate(len(content))
        (root / path).chmod(mode)


def look(root: Path) -> Image:
    """What ``root`` looks like."""
    return {
        os.fspath(path.relative_to(root)): None if path.is_dir() else (path.read_bytes(), path.stat().st_mode & 0o777)
        for path in sorted(root.rglob("*"))
    }


def holding(image: Image) -> Disk:
    """A disk on which ``image`` is, durably."""
    disk = Disk(names={path: (-1,) for path, what in image.items() if what is None})
    for number, (path, what) in enumerate(((p, w) for p, w in image.items() if w is not None), start=1):
        disk.files[number] = _File((what[0],), (what[1],))
        disk.names[path] = (number,)
    return disk


class Recorder:
    """Notes what this process does to the files below ``root`` by way of ``os``, on top of ``disk``.

    At the end of ``recording`` the model must show just what is really there: so nothing has escaped it.
    """

    def __init__(self, root: Path, disk: Disk, *, clones: bool = False) -> None:
        self.root, self.disk, self.clones = root, disk.copy(), clones
        self.ops: list[Op] = []
        self._opened: dict[int, tuple[int, str]] = {}
        self._lock = threading.RLock()
        self._next = max(self.disk.files, default=0) + 1

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in RECORDED:
                real = getattr(os, name)
                stack.enter_context(mock.patch.object(os, name, self._locked(getattr(self, f"_{name}"), real)))
            stack.enter_context(mock.patch("fcntl.ioctl", self._locked(self._ioctl, None)))
            yield
        assert self.disk.live() == look(self.root), "something was done that was not recorded"

    def note(self, what: str, path: str, file: int = 0, **more) -> None:
        op = Op(what, path, file, **more)
        self.disk.apply(op)
        self.ops.append(op)

    def _locked(self, call, real):
        def locked(*args, **more):
            with self._lock:
                return call(real, *args, **more)

        return locked

    def _below(self, path) -> str | None:
        absolute = Path(path).absolute()
        if absolute == self.root:
            return ""
        return os.fspath(absolute.relative_to(self.root)) if absolute.is_relative_to(self.root) else None

    def _open(self, real, path, flags, *args, **more):
        name = self._below(path)
        fd = real(path, flags, *args, **more)
        self._opened.pop(fd, None)
        if name is None:
            return fd
        if flags & os.O_DIRECTORY:
            self._opened[fd] = (-1, name)
        else:
            if flags & os.O_CREAT and self.disk.names.get(name, (None,))[-1] is None:
                self.note("create", name, self._next, at=os.fstat(fd).st_mode & 0o777)
                self._next += 1
            self._opened[fd] = (self.disk.names[name][-1], name)
        return fd

    def _close(self, real, fd):
        self._opened.pop(fd, None)
        real(fd)

    def _mkdir(self, real, path, *args, **more):
        real(path, *args, **more)
        if (name := self._below(path)) is not None:
            self.note("mkdir", name)

    def _pwrite(self, real, fd, data, offset):
        written = real(fd, data, offset)
        if fd in self._opened:
            file, name = self._opened[fd]
            self.note("write", name, file, data=bytes(data[:written]), at=offset)
        return written

    def _copy_file_range(self, real, source, target, count, offset_src, offset_dst):
        copied = real(source, target, count, offset_src, offset_dst)
        if target in self._opened and copied:
            file, name = self._opened[target]
            self.note("write", name, file, data=os.pread(source, copied, offset_src), at=offset_dst)
        return copied

    def _ioctl(self, real, target, request, source):
        assert request == FICLONE
        if not self.clones:
            raise OSError(errno.EOPNOTSUPP, "not on this file system")
        data = os.pread(source, os.fstat(source).st_size, 0)
        os.ftruncate(target, len(data))
        os.pwrite(target, data, 0)

    def _ftruncate(self, real, fd, size):
        real(fd, size)
        if fd in self._opened:
            file, name = self._opened[fd]
            self.note("truncate", name, file, at=size)

    def _fchmod(self, real, fd, mode):
        real(fd, mode)
        if fd in self._opened:
            file, name = self._opened[fd]
            self.note("chmod", name, file, at=mode)

    def _replace(self, real, source, target, **more):
        real(source, target, **more)
        if (name := self._below(source)) is not None:
            self.note("rename", name, to=self._below(target))

    def _unlink(self, real, path, **more):
        real(path, **more)
        if (name := self._below(path)) is not None:
            self.note("unlink", name)

    def _fsync(self, real, fd):
        if fd not in self._opened:
            return
        file, name = self._opened[fd]
        self.note("flush-names" if file == -1 else "flush", name, file)
