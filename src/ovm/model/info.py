"""What a running machine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of a start, and when it was done."""

    name: str
    ms: float
    """Milliseconds since ``start()`` was called."""
    uptime_ms: float | None = None
    """Milliseconds since the guest's kernel began, by its own word; ``None`` of what the host has done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """Whether what a running machine is for can be had of it."""

    problems: tuple[str, ...] = ()
    """What is wrong, in words; empty if nothing is."""
    checked_at: float | None = None
    """When somebody last looked, in seconds since the epoch on the host's clock; ``None`` if nobody has yet."""
    data_size_bytes: int | None = None
    """What the data disk's file system holds in all; ``None`` where it is not known."""
    data_free_bytes: int | None = None
    """What of it is free."""
    host_free_bytes: int | None = None
    """What the host's file system with the data disk has left for it to grow into."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Info:
    """Where a running machine can be reached, and how it runs."""

    podman_socket: Path
    """podman's API, mode 0600; Docker clients speak to it too."""
    podman_port: int | None
    """podman's API on 127.0.0.1, or ``None`` if ``podman_tcp`` is off."""
    ssh_port: int
    """sshd on 127.0.0.1."""
    ssh_key: Path
    ssh_user: str
    hypervisor: str
    """``qemu`` or ``vfkit``."""
    accelerator: str
    accelerator_reason: str
    """Why this accelerator and no other."""
    cpus: int
    memory_mib: int
    data_disk: Path
    log_dir: Path
    timings: tuple[Stage, ...]
    """The steps of the last start."""
    not_resumed: str = ""
    """Why the last start did not go on from a memory that was there; empty if it did, or none was."""
    health: Health
    """What the last look at it found; there is one each minute, and after the host's sleep."""

    @property
    def docker_host(self) -> str:
        """The value of ``DOCKER_HOST`` (and ``CONTAINER_HOST``) for this machine."""
        return f"unix://{self.podman_socket}"
