"""Files that may be anything: a pipe that nobody writes to, a device without an end, gigabytes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def read_file(path: Path, limit_bytes: int) -> bytes:
    """All of the regular file at ``path``; links are followed.

    Raises:
        OSError: there is none, it is no regular file, or it is longer than ``limit_bytes``.
    """
    fd = os.open(path, _READ)
    with open(fd, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        content = bytearray()
        while piece := file.read(limit_bytes + 1 - len(content)):
            content += piece
            if len(content) > limit_bytes:
                raise OSError(errno.EFBIG, f"it is longer than {limit_bytes} bytes", str(path))
        return bytes(content)
