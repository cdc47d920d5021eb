"""Find free ports of this host."""

from __future__ import annotations

import errno
import socket
import sys

from ovm.model.ports import Protocol

LISTENERS = "lsof -nP -i" if sys.platform == "darwin" else "ss -lnptu"
"""Command that lists listening processes."""


def can_bind(protocol: Protocol, address: str, port: int) -> bool:
    """Return whether the port is free on ``address`` now. A port that needs privileges to bind counts as free."""
    return free_port(protocol, address, port) is not None


def free_port(protocol: Protocol, address: str, port: int) -> int | None:
    """Return ``port`` if it is free on ``address`` now (any free port for 0), else ``None``."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as probe:
        if protocol == "tcp":  # as gvproxy does: a port in TIME_WAIT is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            # gvproxy reports other errors itself, such as missing rights or an unknown address
            return None if error.errno == errno.EADDRINUSE else port
        chosen: int = probe.getsockname()[1]
        return chosen
