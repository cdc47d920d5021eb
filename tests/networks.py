"""A gvproxy for a test, without a guest; and ports as podman announces them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ovm.model.ports import Forward, Protocol
from ovm.network import forwarding, gvproxy
from ovm.paths import SocketPaths
from ovm.process.child import Group


@asynccontextmanager
async def started(
    group: Group, program: Path, sockets: SocketPaths, log_path: Path, *, wire: gvproxy.Wire
) -> AsyncIterator[forwarding.Network]:
    """As a machine starts it."""
    gvproxy.lay_out(sockets)
    async with forwarding.start(group, program, sockets, log_path, wire=wire) as network:
        yield network


def published(protocol: Protocol, address: str, port: int) -> Forward:
    """A port that a container publishes; ``address`` is empty where ``-p`` named none."""
    return Forward(protocol=protocol, host_address=address, host_port=port, guest_port=port, purpose="container")
