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

    @property
    def docker_host(self) -> str:
        """The value of ``DOCKER_HOST`` (and ``CONTAINER_HOST``) for this machine."""
        return f"unix://{self.podman_socket}"
