"""A port of the host that leads to a port of the guest."""

from __future__ import annotations

from typing import Literal

import msgspec

Protocol = Literal["tcp", "udp"]
Purpose = Literal["export", "container"]


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """A host port that leads to a port of the guest."""

    protocol: Protocol
    host_address: str
    host_port: int
    guest_port: int
    purpose: Purpose = "export"
    """``export``: asked for through the API; ``container``: published by a container."""

    @property
    def key(self) -> tuple[str, str]:
        """What makes it the same forward for gvproxy."""
        return self.protocol, self.local

    @property
    def local(self) -> str:
        """Gvproxy's name for the host's end."""
        return join(self.host_address, self.host_port)


def join(address: str, port: int) -> str:
    """``address:port``, with brackets where IPv6 needs them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
