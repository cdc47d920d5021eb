"""Results of operations on a running machine."""

from __future__ import annotations

import msgspec


class ClockSync(msgspec.Struct, frozen=True):
    """Result of a clock synchronisation, in seconds."""

    offset_before_s: float
    """Guest minus host before the synchronisation; positive if the guest was ahead."""
    offset_after_s: float
    round_trip_s: float
    """The best round trip; the error is below half of it."""


class ExecResult(msgspec.Struct, frozen=True):
    """Result of a command in the guest."""

    exit_status: int
    """128 + the signal's number if a signal ended the command, as in a shell."""
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, without the last newline."""
        return self.stdout.decode(errors="replace").rstrip("\n")


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a prune."""

    removed: dict[str, int]
    """Number of removed ``pods``, ``containers``, ``images``, ``networks`` and ``volumes``."""
    freed_bytes: dict[str, int]
    """Size of the removed ``containers``, ``images`` and ``volumes``, as podman reports it."""
    trimmed_bytes: int | None
    """Free space that the guest's file system reported to the host, including space never used; ``None`` if the guest
    could not trim."""
    failures: tuple[str, ...] = ()
    """Items podman could not remove, each with the reason."""
