"""A finished image takes the place of another, in one step."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

from ovm.errors import ImageError, SpaceError
from ovm.image.images import DESCRIPTION
from ovm.trust.atomic import sync_directory

_EXCHANGE = 2
"""What renameat2 of Linux and renameatx_np of macOS both call 2: two names change places."""
_AT_FDCWD = -2 if sys.platform == "darwin" else -100


def check_target(target: Path) -> None:
    """Refuse to replace anything but an image or an empty directory.

    Raises:
        ImageError: something else is there.
    """
    if target.exists() and not (target / DESCRIPTION).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ImageError(f"{target} is in the way and is not a guest image", hint="choose another directory with -o")


def into_place(image: Path, target: Path) -> None:
    """Put the finished image where the old one is; the old one goes with the workspace that ``image`` lies in."""
    image.chmod(0o755)
    if not target.exists():
        image.rename(target)
    elif not _exchange(image, target):  # a file system that cannot: two steps
        target.rename(image.with_name("old"))
        image.rename(target)
    sync_directory(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameatx_np" if sys.platform == "darwin" else "renameat2", None)
    if rename is None:  # a C library that does not have it
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0)


def check_space(directory: Path, needed: int) -> None:
    """See that ``needed`` bytes are free where ``directory`` is.

    Raises:
        SpaceError: they are not.
    """
    if (free := shutil.disk_usage(directory).free) < needed:
        raise SpaceError(
            f"{directory} has {free >> 20} MiB free, the image needs {-(-needed >> 20)}",
            hint="free some space, or choose a directory on another disk with -o",
        )
