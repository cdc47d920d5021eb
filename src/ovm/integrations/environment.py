"""The environment variables for docker, podman and testcontainers to use a machine."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

_IN_A_PATH = "/!$&'()*+,;=:@"
"""Characters that are valid in a URL's path and that podman does not encode."""
_DOCKER_SOCKET_IN_GUEST = "/var/run/docker.sock"


def podman_url(socket: Path) -> str:
    """Return the URL of ``socket`` for podman, which requires an encoded path; docker requires a plain one."""
    return f"unix://{quote(str(socket), safe=_IN_A_PATH)}"


def variables(socket: Path) -> dict[str, str]:
    """Return the environment variables for programs to use the container engine at ``socket``."""
    return {
        "DOCKER_HOST": f"unix://{socket}",
        "CONTAINER_HOST": podman_url(socket),
        # podman's API has no BuildKit (containers/podman#17836), which docker build and compose use by default
        "DOCKER_BUILDKIT": "0",
        # the path that the container ryuk mounts: the guest's, not the host's of DOCKER_HOST
        "TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE": _DOCKER_SOCKET_IN_GUEST,
        # published ports listen there; "localhost" may resolve to ::1
        "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
    }
