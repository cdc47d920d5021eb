"""Atomic replacement of an image by a finished one."""

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
"""Flag 2 of both Linux's renameat2 and macOS's renameatx_np: exchange two names."""
_AT_FDCWD = -2 if sys.platform == "darwin" else -100


def check_target(target: Path) -> None:
    """Refuse to replace anything but an image or an empty directory.

    Raises:
        ImageError: something else is there.
    """
    if target.exists() and not (target / DESCRIPTION).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ImageError(f"{target} exists and is not a guest image", hint="choose another directory with -o")


def into_place(image: Path, target: Path) -> None:
    """Replace the old image with the finished one; the old one is deleted with the workspace that has ``image``."""
    image.chmod(0o755)
    if not target.exists():
        image.rename(target)
    elif not _exchange(image, target):  # the file system cannot exchange names: two steps
        target.rename(image.with_name("old"))
        image.rename(target)
    sync_directory(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameatx_np" if sys.platform == "darwin" else "renameat2", None)
    if rename is None:  # the C library lacks it
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0)


def check_space(directory: Path, needed: int) -> None:
    """Check that ``needed`` bytes are free in the file system of ``directory``.

    Raises:
        SpaceError: fewer are free.
    """
    if (free := shutil.disk_usage(directory).free) < needed:
        raise SpaceError(
            f"{directory} has {free >> 20} MiB free, the image requires {-(-needed >> 20)}",
            hint="free some space, or choose a directory on another disk with -o",
        )
