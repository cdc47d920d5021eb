"""The variables by which docker, podman and testcontainers find a machine, and get along with it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

_IN_A_PATH = "/!$&'()*+,;=:@"
"""What a URL's path may have unencoded, and podman does not encode."""
_DOCKER_SOCKET_IN_GUEST = "/var/run/docker.sock"


def podman_url(socket: Path) -> str:
    """The URL of ``socket`` as podman wants it: encoded. docker takes a path as it is."""
    return f"unix://{quote(str(socket), safe=_IN_A_PATH)}"


def variables(socket: Path) -> dict[str, str]:
    """What a program needs in its environment to use the engine behind ``socket``, podman's in a machine."""
    return {
        "DOCKER_HOST": f"unix://{socket}",
        "CONTAINER_HOST": podman_url(socket),
        # podman's API has no BuildKit (containers/podman#17836), which docker build and compose would take for granted
        "DOCKER_BUILDKIT": "0",
        # which path ryuk, a container, mounts: the guest's, not the host's that DOCKER_HOST names
        "TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE": _DOCKER_SOCKET_IN_GUEST,
        # where published ports are: there, and not where else "localhost" may lead, which is ::1 for some
        "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
    }
