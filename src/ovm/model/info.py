"""What a running machine tells of itself."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Stage(msgspec.Struct, frozen=True):
    """A step of a start, and when it was done."""

    name: str
    ms: float
    """Milliseconds since ``start()`` was called."""
    uptime_ms: float | None = None
    """Milliseconds since the guest's kernel began, by its own word; ``None`` of what the host has done."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
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


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """Where the machine is reached, and how it runs."""

    docker_host: str = ""
    """The value of ``DOCKER_HOST`` (and ``CONTAINER_HOST``) for this machine: the URL of ``podman_socket``."""
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
    """Why the last start did not resume a saved state; empty if it did, or if there was none."""
    health: Health
    """What the last look at it found; there is one each minute, and after the host's sleep."""

    def __post_init__(self) -> None:
        """Derive ``docker_host``, which is a field so that it goes over the wire."""
        msgspec.structs.force_setattr(self, "docker_host", f"unix://{self.podman_socket}")
