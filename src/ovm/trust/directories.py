"""Directories that no other user can change or could have created.

A path is as safe as its weakest directory. Each directory of the path must belong to this user or to root, and no other
user may write to it, unless it is sticky: there other users cannot rename or remove our files. A link in the path is
followed if no other user can have created it. The walk uses descriptors, so nothing can be replaced between two checks.

Once a path has passed, no other user can change what it leads to. So its name is safe to use as well: the kernel binds
and connects sockets by name only.
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
"""The kernel's own limit."""
STEPS_MAX = 1000
"""Step limit of a walk, against a user who creates and removes a directory of the path over and over."""
PRIVATE_MODE = 0o700

_MACOS_O_EXEC = 0x40000000
"""With O_DIRECTORY it is O_SEARCH (macOS, sys/fcntl.h), which Python does not define."""
_PASS = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", _MACOS_O_EXEC)
"""Opens a directory that the user may enter, even one that the user may not list."""
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_POSIX_ACL = "system.posix_acl_access"


@contextlib.contextmanager
def opened(path: Path, *, make: bool = False, private: bool = False) -> Iterator[int]:
    """Open the directory at ``path``; yield a descriptor that can be listed and used as ``dir_fd``.

    Args:
        path: May be relative.
        make: Create missing directories of the path with mode 0700.
        private: Require that this user owns it, and set its mode to 0700.

    Raises:
        UntrustedError: another user created, or could change, the directory or one of its parents.
        OSError: it does not exist, or cannot be created or opened.
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
    """Create the missing directories of ``path``. Afterwards its name is safe to use.

    Args:
        path: May be relative.
        private: Require that this user owns it, and set its mode to 0700.

    Raises:
        UntrustedError: another user created, or could change, the directory or one of its parents.
        FileError: it cannot be created.
    """
    try:
        with opened(path, make=True, private=private):
            pass
    except OSError as error:
        hint = advice(error, path) or "choose your own directory, on a disk with free space"
        raise FileError(f"{path} cannot be created: {error.strerror}", hint=hint) from error


def check(path: Path) -> bool:
    """Refuse ``path`` if an existing part of it is not safe; return whether all of it exists.

    Raises:
        UntrustedError: another user created, or could change, the directory or one of its parents.
        FileError: it cannot be reached.
    """
    try:
        os.close(_walk(path, make=False))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise FileError(f"{path} cannot be reached: {error.strerror}", hint="check who owns its directories") from error
    return True


def _make_private(fd: int, path: Path) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise UntrustedError(f"{path} belongs to {_user(status.st_uid)}", hint="choose your own directory")
    if stat.S_IMODE(status.st_mode) != PRIVATE_MODE:
        os.fchmod(fd, PRIVATE_MODE)


def _walk(path: Path, *, make: bool) -> int:
    """Check each directory of ``path``; return a descriptor of the last."""
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
                with contextlib.suppress(FileExistsError):  # created by another process; checked below
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
    """Replace ``fd`` with a descriptor of the directory ``name``."""
    moved = os.open(name, _PASS, dir_fd=fd)
    os.close(fd)
    return moved


def _check_directory(fd: int, here: Path, path: Path) -> None:
    status = os.fstat(fd)
    if status.st_uid not in _trusted_users():
        raise UntrustedError(
            f"{path} cannot be trusted: {here} belongs to {_user(status.st_uid)}",
            hint=f"remove {here}, or choose your own directory",
        )
    if status.st_mode & stat.S_ISVTX:
        return
    if status.st_mode & stat.S_IWOTH:
        raise UntrustedError(f"{path} cannot be trusted: everybody can write to {here}", hint=f"run chmod o-w {here}")
    if status.st_mode & stat.S_IWGRP and not _is_ours_alone(fd, status):
        raise UntrustedError(
            f"{path} cannot be trusted: other members of the group {_group(status.st_gid)} can write to {here}",
            hint=f"run chmod g-w {here}",
        )


def _check_link(parent: int, link: os.stat_result, here: Path, path: Path) -> None:
    """Refuse a link that another user may have created: in a sticky directory, by a hard link too."""
    if not os.fstat(parent).st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        return
    if link.st_uid not in _trusted_users() or link.st_nlink != 1:
        raise UntrustedError(
            f"{path} cannot be trusted: {here} is a link that {_user(link.st_uid)} may have created",
            hint=f"remove {here}, or choose your own directory",
        )


def _trusted_users() -> set[int]:
    return {0, os.geteuid()}


def _is_ours_alone(fd: int, status: os.stat_result) -> bool:
    """Return whether this user is the only member of the group: many systems give each user a private group."""
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
    """Return whether an ACL gives more users rights; the mode's group bits then stand for theirs, too."""
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
