"""Checks which user listens on a unix socket: the kernel's answer, before the first byte is trusted."""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

from ovm.errors import UntrustedError
from ovm.trust import directories

_SOL_LOCAL = 0
_LOCAL_PEERCRED = 1
"""macOS, sys/un.h; Python does not define them."""
_XUCRED = struct.Struct("=IIh")
"""The head of macOS's ``struct xucred``: version, user, number of groups that follow (sys/ucred.h)."""
_XUCRED_VERSION = 0
_XUCRED_BYTES = 76
_UCRED = struct.Struct("=iII")
"""Linux's ``struct ucred``: pid, user, group."""


def check_way(path: Path) -> None:
    """Refuse to connect to, or bind, the socket at ``path`` unless its directory is safe.

    Raises:
        UntrustedError: another user created, or could change, a directory of the path.
        FileError: a directory of the path cannot be reached.
    """
    directories.check(path.parent)


def check_peer(connection: socket.socket, path: Path) -> None:
    """Refuse a connection to ``path`` if neither this user nor root accepted it.

    Raises:
        UntrustedError: it was another user.
        OSError: the kernel does not report the user.
    """
    user = peer_user(connection)
    if user not in {0, os.geteuid()}:
        raise UntrustedError(f"another user, with id {user}, listens on {path}", hint=f"remove {path}")


def peer_user(connection: socket.socket) -> int:
    """Return the user of the process that created the listening socket at the other end.

    Raises:
        OSError: the kernel does not report it.
    """
    if sys.platform == "darwin":
        version, user, _groups = _XUCRED.unpack_from(connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_BYTES))
        if version != _XUCRED_VERSION:
            raise OSError(f"LOCAL_PEERCRED answered with version {version}")
        return int(user)
    _pid, user, _group = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(user)
