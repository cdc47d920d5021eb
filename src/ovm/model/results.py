"""What an operation on a running machine returns."""

from __future__ import annotations

import msgspec


class ClockSync(msgspec.Struct, frozen=True):
    """What a synchronisation of the clock found and left, in seconds."""

    offset_before_s: float
    """Guest minus host, before; positive if the guest was ahead."""
    offset_after_s: float
    round_trip_s: float
    """The best round trip; the error is below half of it."""


class ExecResult(msgspec.Struct, frozen=True):
    """How a command in the guest ended."""

    exit_status: int
    """128 + the signal's number if a signal ended it, as a shell would say."""
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, without the last newline."""
        return self.stdout.decode(errors="replace").rstrip("\n")


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What a prune has removed."""

    removed: dict[str, int]
    """How many of each: ``pods``, ``containers``, ``images``, ``networks``, ``volumes``."""
    freed_bytes: dict[str, int]
    """What podman says they took up: ``containers``, ``images``, ``volumes``."""
    trimmed_bytes: int | None
    """Free room in the guest's file system that the host was told of, room that was never used included; ``None``
    where the guest could not tell it."""
    failures: tuple[str, ...] = ()
    """What podman could not remove, and why."""
