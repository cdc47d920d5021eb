"""What a run found, as it is written to a file and read again."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bench.samples import Samples

FORMAT = 1
"""Changes when an older file can no longer be read."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The machine on which it ran, and with what."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    qemu: str
    gvproxy: str
    accelerator: str
    image: str
    """The digest of the guest's root file system."""
    guest_cpus: int
    guest_memory_mib: int


class Noise(msgspec.Struct, frozen=True, kw_only=True):
    """What else the machine did, when nothing of ours ran."""

    load: float
    """The load of the last minute."""
    busy: float
    """The share of all processors that was in use over the next moment, 0 to 1."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A run."""

    format: int
    at: str
    """When it began, as ISO 8601 has it."""
    took_s: float
    runs: int
    smoke: bool
    host: Host
    before: Noise
    after: Noise
    rows: dict[str, Samples]
    missing: dict[str, str]
    """What was not measured, by the name of its group, and why."""
    spoiled: dict[str, list[str]] = {}
    """Runs that were not counted, by their row, and why."""

    def save(self, path: Path) -> None:
        """Write it to a file."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is something else.
            OSError: it cannot be read.
        """
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} is no result of a benchmark: {error}") from error
        if found.format != FORMAT:
            raise ValueError(f"{path} has the format {found.format} instead of {FORMAT}")
        return found
