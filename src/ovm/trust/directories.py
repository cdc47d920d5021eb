"""Directories that no other user can change, and no other user could have put there.

A path is as safe as its weakest directory. Each one on the way must belong to this user or to root, and be writable
by nobody else, unless it is sticky: there nobody can rename or remove what is ours. A link on the way is followed if
no other user can have made it. The way is walked by descriptors, so nothing is exchanged between a look and the next.

Once a path has passed, no other user can change what it leads to. So it can be used by its name, too: for binding and
connecting sockets, which the kernel does by name alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ovm.errors import FileError, UntrustedError
from ovm.trust.files import advice

LINKS_MAX = 40
"""As many links as the kernel itself follows."""
STEPS_MAX = 1000
"""Of a walk; somebody who makes and removes a directory on the way, over and over, must not keep us there."""
PRIVATE_MODE = 0o700

_MACOS_O_EXEC = 0x40000000
"""With O_DIRECTORY it is O_SEARCH (macOS, sys/fcntl.h), which Python does not name."""
_PASS = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", _MACOS_O_EXEC)
"""Opens a directory that may be entered, even one that may not be listed."""
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_POSIX_ACL = "system.posix_acl_access"


@contextlib.contextmanager
def opened(path: Path, *, make: bool = False, private: bool = False) -> Iterator[int]:
    """The directory at ``path``, as a descriptor that can be listed and used as ``dir_fd``.

    Args:
        path: Made absolute if it is not.
        make: Make what is missing of it, each directory with mode 0700.
        private: It must be this user's own, and gets mode 0700 if it has another.

    Raises:
        UntrustedError: another user made, or could change, the directory or one that leads to it.
        OSError: there is none, or it cannot be made or opened.
    """
    passing = _walk(path, make=make)
    try:
        fd = os.open(".", _READ, dir_fd=passing)
    finally:
        os.close(passing)
    try:
        if private:
            _make_private(fd, path)
        yield fd
    finally:
        os.close(fd)


def make(path: Path, *, private: bool = False) -> None:
    """Make what is missing of ``path``. Its name is safe to use then.

    Args:
        path: Made absolute if it is not.
        private: It must be this user's own, and gets mode 0700 if it has another.

    Raises:
        UntrustedError: another user made, or could change, the directory or one that leads to it.
        FileError: it cannot be made.
    """
    try:
        with opened(path, make=True, private=private):
            pass
    except OSError as error:
        hint = advice(error, path) or "choose a directory of your own, on a disk with room"
        raise FileError(f"{path} cannot be made: {error.strerror}", hint=hint) from error


def check(path: Path) -> bool:
    """Refuse ``path`` if what exists of it is not safe; whether all of it exists. Its name is safe to use then.

    Raises:
        UntrustedError: another user made, or could change, the directory or one that leads to it.
        FileError: it cannot be looked at.
    """
    try:
        os.close(_walk(path, make=False))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise FileError(f"{path} cannot be reached: {error.strerror}", hint="check who owns the way to it") from error
    return True


def _make_private(fd: int, path: Path) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise UntrustedError(f"{path} belongs to {_user(status.st_uid)}", hint="choose a directory of your own")
    if stat.S_IMODE(status.st_mode) != PRIVATE_MODE:
        os.fchmod(fd, PRIVATE_MODE)


def _walk(path: Path, *, make: bool) -> int:
    """A descriptor of the directory at ``path``, all of whose way has been checked."""
    todo = list(reversed(path.absolute().parts[1:]))
    links = steps = 0
    here = Path("/")
    fd = os.open("/", _PASS)
    try:
        _check_directory(fd, here, path)
        while todo:
            name = todo.pop()
            steps += 1
            if steps > STEPS_MAX:
                raise UntrustedError(f"{path} cannot be trusted: {here / name} keeps changing")
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                if not make:
                    raise
                with contextlib.suppress(FileExistsError):  # another start of ours was quicker, or it is checked below
                    os.mkdir(name, PRIVATE_MODE, dir_fd=fd)
                todo.append(name)
                continue
            if stat.S_ISLNK(status.st_mode):
                links += 1
                _check_link(fd, status, here / name, path)
                if links > LINKS_MAX:
                    raise UntrustedError(f"{path} leads through more than {LINKS_MAX} links")
                target = Path(os.readlink(name, dir_fd=fd))
                todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)
                if target.is_absolute():
                    fd, here = _moved(fd, "/"), Path("/")
                continue
            fd, here = _moved(fd, name), here / name
            _check_directory(fd, here, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _moved(fd: int, name: str) -> int:
    """A descriptor of the directory ``name``, in place of ``fd``."""
    moved = os.open(name, _PASS, dir_fd=fd)
    os.close(fd)
    return moved


def _check_directory(fd: int, here: Path, path: Path) -> None:
    status = os.fstat(fd)
    if status.st_uid not in _trusted_users():
        raise UntrustedError(
            f"{path} cannot be trusted: {here} belongs to {_user(status.st_uid)}",
            hint=f"remove {here}, or choose a directory of your own",
        )
    if status.st_mode & stat.S_ISVTX:
        return
    if status.st_mode & stat.S_IWOTH:
        raise UntrustedError(f"{path} cannot be trusted: everybody can write to {here}", hint=f"chmod o-w {here}")
    if status.st_mode & stat.S_IWGRP and not _is_ours_alone(fd, status):
        raise UntrustedError(
            f"{path} cannot be trusted: others of the group {_group(status.st_gid)} can write to {here}",
            hint=f"chmod g-w {here}",
        )


def _check_link(parent: int, link: os.stat_result, here: Path, path: Path) -> None:
    """Where only we can write, only we have made it. In a sticky directory others may have, by a hard link too."""
    if not os.fstat(parent).st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        return
    if link.st_uid not in _trusted_users() or link.st_nlink != 1:
        raise UntrustedError(
            f"{path} cannot be trusted: {here} is a link that {_user(link.st_uid)} may have made",
            hint=f"remove {here}, or choose a directory of your own",
        )


def _trusted_users() -> set[int]:
    return {0, os.geteuid()}


def _is_ours_alone(fd: int, status: os.stat_result) -> bool:
    """Whether only this user is in the group that can write: the group of its own that many systems give each user."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    if group.gr_gid != user.pw_gid or group.gr_name != user.pw_name or set(group.gr_mem) - {user.pw_name}:
        return False
    return not _has_acl(fd)


def _has_acl(fd: int) -> bool:
    """Whether more users have rights to it than its mode shows: the group's bits then stand for theirs, too."""
    if not hasattr(os, "getxattr"):
        return False
    try:
        os.getxattr(f"/proc/self/fd/{fd}", _POSIX_ACL)
    except OSError:
        return False
    return True


def _user(uid: int) -> str:
    import pwd

    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user with id {uid}"


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
