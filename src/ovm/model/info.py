"""Information about a running machine."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Stage(msgspec.Struct, frozen=True):
    """A completed step of a start."""

    name: str
    ms: float
    """Milliseconds since ``start()`` was called."""
    uptime_ms: float | None = None
    """Guest uptime in milliseconds, as the guest reports it; ``None`` for a step of the host."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Health of a running machine."""

    problems: tuple[str, ...] = ()
    """The health problems, as text; empty if there are none."""
    checked_at: float | None = None
    """Time of the last health check, in seconds since the epoch on the host's clock; ``None`` before the first."""
    data_size_bytes: int | None = None
    """Total size of the data disk's file system; ``None`` if unknown."""
    data_free_bytes: int | None = None
    """Free space in the data disk's file system; ``None`` if unknown."""
    host_free_bytes: int | None = None
    """Free space in the host's file system that holds the data disk; ``None`` if unknown."""

    @property
    def ok(self) -> bool:
        """Whether there are no health problems."""
        return not self.problems


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's addresses, and how it runs."""

    docker_host: str = ""
    """The value of ``DOCKER_HOST`` (and ``CONTAINER_HOST``) for this machine: the URL of ``podman_socket``."""
    podman_socket: Path
    """podman's API socket, mode 0600; Docker clients can use it too."""
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
    """Why this accelerator was chosen."""
    cpus: int
    memory_mib: int
    data_disk: Path
    log_dir: Path
    timings: tuple[Stage, ...]
    """The steps of the last start."""
    not_resumed: str = ""
    """Why the last start did not resume a saved state; empty if it did, or if there was none."""
    health: Health
    """Result of the last health check; one runs each minute, and after the host's sleep."""

    def __post_init__(self) -> None:
        """Set ``docker_host``, which is a field so that it is serialized."""
        msgspec.structs.force_setattr(self, "docker_host", f"unix://{self.podman_socket}")
