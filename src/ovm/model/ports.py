"""Forwards: host ports forwarded to guest ports."""

from __future__ import annotations

from typing import Literal

import msgspec

Protocol = Literal["tcp", "udp"]
Purpose = Literal["export", "container"]


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """A host port forwarded to a guest port."""

    protocol: Protocol
    host_address: str
    host_port: int
    guest_port: int
    purpose: Purpose = "export"
    """``export``: requested through the API; ``container``: published by a container."""

    @property
    def key(self) -> tuple[str, str]:
        """Identity of the forward in gvproxy."""
        return self.protocol, self.local

    @property
    def local(self) -> str:
        """Gvproxy's notation for the host side."""
        return join(self.host_address, self.host_port)


def join(address: str, port: int) -> str:
    """Return ``address:port``, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
