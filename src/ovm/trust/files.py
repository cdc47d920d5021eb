"""Safe reads of paths that may be anything: a pipe without a writer, an endless device, a file of gigabytes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def read_file(path: Path, limit_bytes: int) -> bytes:
    """Return the content of the regular file at ``path``; follow links.

    Raises:
        OSError: it does not exist, is not a regular file, or is longer than ``limit_bytes``.
    """
    fd = os.open(path, _READ)
    with open(fd, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = bytearray()
        while piece := file.read(limit_bytes + 1 - len(content)):
            content += piece
            if len(content) > limit_bytes:
                raise OSError(errno.EFBIG, f"it is longer than {limit_bytes} bytes", str(path))
        return bytes(content)


def advice(error: OSError, path: Path) -> str:
    """Return a hint for ``error``, raised by creating or replacing ``path``; empty if there is none."""
    if error.errno == errno.EROFS:
        return f"choose another directory: the file system of {path.parent} is mounted read-only"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"check the owner and mode of {path.parent} and of the files in it"
    if error.errno == errno.EISDIR:
        return f"remove {path}: it is a directory"
    if error.errno == errno.EEXIST:
        return f"move {path} away"
    if error.errno == errno.ENOTDIR:
        return f"check {path}: it or one of its parents is not a directory"
    if error.errno == errno.ELOOP:
        return f"remove the link {path}: it leads back to itself"
    return ""
