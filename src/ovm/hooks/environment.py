"""The variables by which docker, podman and testcontainers find a machine, and get along with it."""

from __future__ import annotations

from pathlib import Path

_DOCKER_SOCKET_IN_GUEST = "/var/run/docker.sock"


def variables(socket: Path) -> dict[str, str]:
    """What a program needs in its environment to use the engine behind ``socket``, podman's in a machine."""
    return {
        "DOCKER_HOST": f"unix://{socket}",
        "CONTAINER_HOST": f"unix://{socket}",
        # podman's API has no BuildKit (containers/podman#17836), which docker build and compose would take for granted
        "DOCKER_BUILDKIT": "0",
        # which path ryuk, a container, mounts: the guest's, not the host's that DOCKER_HOST names
        "TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE": _DOCKER_SOCKET_IN_GUEST,
        # where published ports are: there, and not where else "localhost" may lead, which is ::1 for some
        "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
    }
