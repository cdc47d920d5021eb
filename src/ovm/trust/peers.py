"""Who listens behind a unix socket: asked of the kernel, before a byte of what it sends is believed."""

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
"""macOS, sys/un.h; Python does not name them."""
_XUCRED = struct.Struct("=IIh")
"""The head of macOS's ``struct xucred``: its version, the user, how many groups follow (sys/ucred.h)."""
_XUCRED_VERSION = 0
_XUCRED_BYTES = 76
_UCRED = struct.Struct("=iII")
"""Linux's ``struct ucred``: pid, user, group."""


def check_way(path: Path) -> None:
    """Refuse to connect to, or bind, the socket at ``path`` unless its directory is safe.

    Raises:
        UntrustedError: another user made, or could change, a directory on the way.
        FileError: a directory on the way cannot be looked at.
    """
    directories.check(path.parent)


def check_peer(connection: socket.socket, path: Path) -> None:
    """Refuse a connection to ``path`` that was accepted by neither this user nor root.

    Raises:
        UntrustedError: it was another user.
        OSError: the kernel does not say who it was.
    """
    user = peer_user(connection)
    if user not in {0, os.geteuid()}:
        raise UntrustedError(f"behind {path} listens another user, with id {user}", hint=f"remove {path}")


def peer_user(connection: socket.socket) -> int:
    """The user of the process that made the listening socket at the other end.

    Raises:
        OSError: the kernel does not say.
    """
    if sys.platform == "darwin":
        version, user, _groups = _XUCRED.unpack_from(connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_BYTES))
        if version != _XUCRED_VERSION:
            raise OSError(f"LOCAL_PEERCRED answered with version {version}")
        return int(user)
    _pid, user, _group = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(user)
